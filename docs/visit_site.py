"""Visits every page of the built site in a headless Chromium.

    python docs/visit_site.py build/docs

Needs the package `playwright` and a Chromium of the system. On each page: one title, headings that
skip no level, formulas and pictures that take up room, links whose pages and places exist, and
nothing in the console. With `--picture DIR`, two pages are kept as pictures to look at.
"""

import argparse
import itertools
import pathlib
import shutil
import sys
import urllib.parse

from playwright.sync_api import sync_playwright

LOOK = """() => ({
    headings: [...document.querySelectorAll('article h1, article h2, article h3, article h4')]
        .map(h => Number(h.tagName[1])),
    formulas: [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width),
    pictures: [...document.querySelectorAll('article img')].map(i => [i.src, i.naturalWidth]),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    places: [...document.querySelectorAll('[id]')].map(e => e.id),
    wide: document.documentElement.scrollWidth > window.innerWidth + 1,
})"""


def complaints(seen, console, is_article):
    """What is wrong with one page, beside its links."""
    levels = seen["headings"]
    if is_article and levels.count(1) != 1:
        yield f"{levels.count(1)} titles"
    for before, after in itertools.pairwise(levels):
        if after > before + 1:
            yield f"a heading of level {after} under one of level {before}"
    if any(width < 1 for width in seen["formulas"]):
        yield "a formula that is not drawn"
    yield from (f"picture {source} is missing" for source, width in seen["pictures"] if not width)
    if seen["wide"]:
        yield "wider than the window"
    yield from (f"console: {text}" for text in console)


def dead_links(page, seen, visited):
    """Links within the site to what is not there. Links to elsewhere are not followed."""
    for link in sorted(set(seen["links"])):
        address, _, place = link.partition("#")
        if not address.startswith("file:"):
            continue
        target = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path))
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"{page.name}: {target} does not exist"
        elif place and target in visited and place not in visited[target]["places"]:
            yield f"{page.name}: {target.name} has no #{place}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    pages = sorted(arguments.site.resolve().rglob("*.html"))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    found, visited, formulas = [], {}, 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1300, "height": 1000})
        console, requests = [], []
        tab.on("console", lambda m: console.append(m.text) if m.type != "log" else None)
        tab.on("pageerror", lambda error: console.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        for page in pages:
            console.clear()
            tab.goto(page.as_uri())
            seen = visited[page] = tab.evaluate(LOOK)
            formulas += len(seen["formulas"])
            is_article = page.stem not in ("genindex", "search", "py-modindex")
            is_article = is_article and "_modules" not in page.parts
            found += [f"{page.name}: {text}" for text in complaints(seen, console, is_article)]
            if arguments.picture and page.stem in ("how_it_works", "index"):
                arguments.picture.mkdir(parents=True, exist_ok=True)
                tab.screenshot(path=arguments.picture / f"{page.stem}.png", full_page=True)
        browser.close()
    outside = sorted({url for url in requests if not url.startswith(("file:", "data:"))})
    found += [f"a page asks the network for {url}" for url in outside]
    for page, seen in visited.items():
        found += dead_links(page, seen, visited)
    print(f"{len(pages)} pages, {formulas} formulas")
    print("\n".join(found) or "Nothing to complain about.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
