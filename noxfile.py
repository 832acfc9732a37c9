"""What CI runs: `nox`, then `nox -s thorough`. `nox --list` shows the parts."""

import re

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "virtualenv"

KERAS = "3.15.1"
FRAMEWORKS = {
    "tensorflow": "tensorflow-cpu==2.21.*",
    "jax": "jax==0.10.*",
    "torch": "torch==2.13.0",
}
# What a few tests take beside, where it can be installed without a second framework.
BESIDE = {
    "tensorflow": ["tensorboard==2.21.*"],
    "jax": ["flax==0.12.*", "orbax-checkpoint==0.12.*"],
    "torch": [],
}
ACROSS = "integration_tests/test_files_across_backends.py"
# Beside the three, Keras loads models on NumPy, which it brings along, and on this.
LOADERS = ["openvino==2026.*"]

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OLDEST_KERAS = re.fullmatch(r"keras>=([\d.]+)", PROJECT["dependencies"][0])[1]
THOROUGH = ("-m", "thorough")
ALL = ("tests", "integration_tests", f"--ignore={ACROSS}")


@nox.session
def lint(session):
    """Formatting, style and types."""
    session.install(*tools("ruff", "mypy"))
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("mypy")


each_backend = nox.parametrize("backend", list(FRAMEWORKS), ids=list(FRAMEWORKS))


@nox.session
@each_backend
def tests(session, backend):
    """The quick tests on one backend, with no other framework installed."""
    prepare(session, backend)
    run_tests(session, backend, *ALL)


@nox.session
def thorough(session):
    """All that the quick tests leave out: see CONTRIBUTING.md. Takes about half an hour."""
    for backend in FRAMEWORKS:
        session.notify(f"rest({backend})")
    session.notify("oldest")
    session.notify("across")


@nox.session
@each_backend
def rest(session, backend):
    """The thorough tests on one backend."""
    prepare(session, backend)
    run_tests(session, backend, *THOROUGH, *ALL)


@nox.session
def oldest(session):
    """The quick tests on the oldest Keras that pyproject.toml admits."""
    prepare(session, "torch", f"keras=={OLDEST_KERAS}")  # where they take the least time
    run_tests(session, "torch", "tests")


@nox.session
def across(session):
    """What is written on one backend is read on all others, which takes all of them."""
    needs = [f"keras=={KERAS}", *FRAMEWORKS.values(), *LOADERS]
    session.install(".", *needs, *tools("pytest"))
    session.run("pytest", "-m", "", ACROSS, *session.posargs, env=environment("jax"))


@nox.session
@each_backend
def campaign(session, backend):
    """Everything under attack, for hours: see docs/campaign.md. A short mode is in the tests."""
    prepare(session, backend)
    env = environment(backend) | (compiled_once(session) if backend == "jax" else {})
    walks = "10000" if backend == "torch" else "1000"
    for program, *arguments in [
        ("walks.py", "--walks", walks),
        ("hostile.py", "--files", "5000"),
        ("kills.py", "--kills", "200"),
        ("long_runs.py", "--steps", "100000"),
        ("threads.py", "--times", "20"),
        ("jobs.py", "--sizes", "4", "8"),
    ]:
        session.run("python", f"campaign/{program}", *arguments, env=env)


@nox.session
@each_backend
def next(session, backend):
    """The quick tests on the next Keras. A failure here is news, not a verdict."""
    prepare(session, backend, "keras-nightly")
    run_tests(session, backend, "tests")


@nox.session
def quickstart(session):
    """The first example, on JAX or on the backend named after `--`."""
    backend = session.posargs[0] if session.posargs else "jax"
    session.install(".[examples]", f"keras=={KERAS}", FRAMEWORKS[backend])
    session.run("python", "examples/quickstart.py", env=environment(backend))


def prepare(session, backend, keras=f"keras=={KERAS}"):
    """Installs the wheel, one framework and what the tests need."""
    needs = [FRAMEWORKS[backend], *BESIDE[backend]]
    session.install(".", *needs, *tools("pytest", "pytest-xdist", "hypothesis"))
    if keras.startswith("keras-nightly"):  # in the place of the release, under the same name
        session.run("pip", "uninstall", "-q", "-y", "keras")
        session.install("--pre", "--no-deps", "--force-reinstall", keras)
    else:
        session.install(keras)
    expect_no_framework_but(session, backend)


def run_tests(session, backend, *what):
    """Runs the tests on the installed wheel: `pytest` leaves the working folder out of the path."""
    env = environment(backend) | (compiled_once(session) if backend == "jax" else {})
    session.run("pytest", "-n", "2", *what, *session.posargs, env=env)


def expect_no_framework_but(session, backend):
    """Fails where a dependency brought a second framework along."""
    others = sorted(FRAMEWORKS.keys() - {backend})
    found = f"[name for name in {others} if find_spec(name)]"
    check = f"from importlib.util import find_spec; found = {found}; assert not found, found"
    session.run("python", "-c", check)


def environment(backend):
    """Environment variables for Keras on `backend`, without TensorFlow's log."""
    return {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}


def compiled_once(session):
    """On JAX most of the time would go into compiling the same small programs for each model."""
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{session.virtualenv.location}/../compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def tools(*names):
    """The `dev` requirements of these names, so that versions stand in pyproject.toml alone."""
    dev = {re.match(r"[\w-]+", line)[0]: line for line in PROJECT["optional-dependencies"]["dev"]}
    return [dev[name] for name in names]
