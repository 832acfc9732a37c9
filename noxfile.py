"""The sessions for CI: it runs `nox`, and then `nox -s thorough`. `nox --list` shows them all."""

import pathlib
import re
import shutil

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"

KERAS = "3.15.1"
FRAMEWORKS = {
    "tensorflow": "tensorflow-cpu==2.21.*",
    "jax": "jax==0.10.*",
    "torch": "torch==2.13.0",
}
# A few tests need these packages. They are installed where they do not need a second framework.
BESIDE = {
    "tensorflow": ["tensorboard==2.21.*"],
    "jax": ["flax==0.12.*", "orbax-checkpoint==0.12.*"],
    "torch": [],
}
LIGHTNING = ["pytorch-lightning", "lightning-utilities", "torchmetrics", "tqdm", "packaging"]
# What else averages, to be measured beside.
RIVALS = {"tensorflow": [], "jax": [], "torch": ["timm", "ema-pytorch", *LIGHTNING]}
ACROSS = "integration_tests/test_files_across_backends.py"
# Keras can also load models on NumPy, which is installed with it, and on this backend.
LOADERS = ["openvino==2026.*"]

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST_KERAS = re.fullmatch(r"keras>=([\d.]+)", PROJECT["dependencies"][0])[1]
ALL = ("tests", "integration_tests", f"--ignore={ACROSS}")


@nox.session
def lint(session):
    """Checks formatting, style and types."""
    session.install(*tools("ruff", "mypy"))
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("mypy")


each_backend = nox.parametrize("backend", list(FRAMEWORKS), ids=list(FRAMEWORKS))


@nox.session(reuse_venv=True)  # `thorough` takes it after the quick tests.
@each_backend
def tests(session, backend):
    """Runs the quick tests on one backend, or others: `-- -m thorough`."""
    with_examples = "-m" in session.posargs  # Tests that are not quick run the examples too.
    prepare(session, backend, package=".[examples]" if with_examples else ".")
    run_tests(session, backend, *ALL)


@nox.session
def thorough(session):
    """Runs most of what the quick sessions leave out, in half an hour. CI runs it after them."""
    for backend in FRAMEWORKS:
        session.notify(f"tests({backend})", posargs=("-m", "thorough and not exhaustive"))
    session.notify("oldest")
    session.notify("across")
    session.notify("docs")
    session.notify("package")


@nox.session
def exhaustive(session):
    """Runs the combinations that `thorough` leaves out, because they are compiled one by one."""
    for backend in ("tensorflow", "jax"):
        session.notify(f"tests({backend})", posargs=("-m", "exhaustive"))


@nox.session
def oldest(session):
    """Runs the quick tests on the oldest Keras that pyproject.toml allows."""
    prepare(session, "torch", f"keras=={OLDEST_KERAS}")  # Torch takes the least time.
    run_tests(session, "torch", "tests")


@nox.session
def across(session):
    """Reads files from each backend on all others. So all backends are installed."""
    needs = [f"keras=={KERAS}", *FRAMEWORKS.values(), *LOADERS]
    session.install(".", *needs, *tools("pytest"))
    session.run("pytest", "-m", "", ACROSS, *session.posargs, env=environment("jax"))


@nox.session
@each_backend
def campaign(session, backend):
    """Everything under attack, for hours: see docs/campaign.md. A short mode is in the tests."""
    prepare(session, backend)
    # Two processes run the tests. If torch took all cores in each, they would wait for each other.
    env = environment(backend) | {"OMP_NUM_THREADS": "1"}
    env |= compiled_once(session) if backend == "jax" else {}
    walks = "10000" if backend == "torch" else "1000"
    failed: list[str] = []
    for program, *arguments in [
        ("walks.py", "--walks", walks),
        ("hostile.py", "--files", "5000"),
        ("kills.py", "--kills", "200"),
        ("long_runs.py", "--steps", "100000"),
        ("threads.py", "--times", "20"),
        ("jobs.py", "--sizes", "4", "8"),
    ]:
        try:
            session.run("python", f"campaign/{program}", *arguments, env=env)
        except nox.command.CommandFailed:
            failed.append(program)  # The other programs run too.
    if failed:
        session.error(f"violations were found by {', '.join(failed)}")


@nox.session
@each_backend
def next(session, backend):
    """Runs the quick tests on the next Keras. A failure here does not fail CI."""
    prepare(session, backend, "keras-nightly")
    run_tests(session, backend, "tests")


@nox.session
@each_backend
def benchmarks(session, backend):
    """What averaging costs beside what else averages. After `--`: options of benchmarks/."""
    session.install(".", f"keras=={KERAS}", FRAMEWORKS[backend], *BESIDE[backend], "matplotlib")
    for rival in RIVALS[backend]:
        session.install("--no-deps", rival)  # without a second copy of the framework
    command = ("python", "-m", "benchmarks", "--backend", backend)
    session.run(*command, *session.posargs, env=environment(backend))


@nox.session
def quickstart(session):
    """Runs the first example, on JAX or on the backend that is named after `--`."""
    backend = session.posargs[0] if session.posargs else "jax"
    session.install(".[examples]", f"keras=={KERAS}", FRAMEWORKS[backend])
    session.run("python", "examples/quickstart.py", env=environment(backend))


@nox.session
def package(session):
    """Wheel and sdist, in dist/, and a look at what is in them."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install(*tools("build", "twine"))
    session.run("python", "-m", "build")
    built = sorted(map(str, pathlib.Path("dist").iterdir()))
    session.run("twine", "check", "--strict", *built)
    session.run("python", "tests/programs/check_package.py", *built)


@nox.session
def docs(session):
    """The documentation, in build/docs. A warning, such as of a dead link, is an error."""
    session.install(".[docs]", f"keras=={KERAS}", FRAMEWORKS["jax"])
    build = ("sphinx-build", "-q", "-E", "-W", "--keep-going", "docs", "build/docs")
    session.run(*build, *session.posargs, env=environment("jax"))


@nox.session
def visit(session):
    """Each page that `docs` has built, in the Chromium of this machine."""
    session.install("playwright")
    session.run("python", "docs/visit_site.py", "build/docs", *session.posargs)


def prepare(session, backend, keras=f"keras=={KERAS}", package="."):
    """Installs the wheel, one framework, and the packages that the tests need."""
    needs = [FRAMEWORKS[backend], *BESIDE[backend]]
    session.install(package, *needs, *tools("pytest", "pytest-xdist", "hypothesis"))
    if keras.startswith("keras-nightly"):  # It replaces the release, and has the same import name.
        session.run("pip", "uninstall", "-q", "-y", "keras")
        session.install("--pre", "--no-deps", "--force-reinstall", keras)
    else:
        session.install(keras)
    expect_no_framework_but(session, backend)


def run_tests(session, backend, *what):
    """Runs the tests on the wheel. `pytest` does not put the working folder on the path."""
    # Two processes run the tests. If torch took all cores in each, they would wait for each other.
    env = environment(backend) | {"OMP_NUM_THREADS": "1"}
    env |= compiled_once(session) if backend == "jax" else {}
    session.run("pytest", "-n", "2", "--dist", "worksteal", *what, *session.posargs, env=env)


def expect_no_framework_but(session, backend):
    """Fails if a dependency has installed a second framework."""
    others = sorted(FRAMEWORKS.keys() - {backend})
    found = f"[name for name in {others} if find_spec(name)]"
    check = f"from importlib.util import find_spec; found = {found}; assert not found, found"
    session.run("python", "-c", check)


def environment(backend):
    """Environment variables for Keras on `backend`, without TensorFlow's log."""
    return {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}


def compiled_once(session):
    """Settings that keep compiled programs. JAX would compile the same ones for each model."""
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{session.virtualenv.location}/../compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def tools(*names):
    """The `dev` requirements of these names. So only pyproject.toml has version numbers."""
    dev = {re.match(r"[\w-]+", line)[0]: line for line in PROJECT["optional-dependencies"]["dev"]}
    return [dev[name] for name in names]
