"""The files of the pages for people, and the paths under which they are served."""

from pathlib import Path

FOLDER = Path(__file__).parent / "pages"
PAGES = {"/": "root.html", "/cache": "cache.html", "/docs": "docs.html"}
FILES = {"style.css": "text/css", **dict.fromkeys(("key.js", "root.js", "cache.js", "docs.js"), "text/javascript")}
PATHS = frozenset({*PAGES, *(f"/pages/{name}" for name in FILES)})  # they hold nothing of the server's, and need no key
