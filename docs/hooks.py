"""The site of the repository's own pages: links work here as they do between files.

README.md is the home. What a page links to outside docs/ becomes a page too: Markdown as it is, source as a listing, a
folder as the list of its files; anything else is copied. So no page is written twice, and a link to a file that does
not exist fails the build.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""The target of a relative link, and its anchor."""
FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)

_paths: dict[str, str] = {}
"""Page of the site, without an ending -> the file or folder of the repository that it shows."""


def page_of(path: str) -> str:
    """Where the site has this file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return f"{path}.md" if path.endswith((".py", ".yaml", ".cpp", ".h")) else path


def targets(text: str, path: str) -> set[str]:
    """What the page of ``path`` links to, as paths in the repository."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), m[1])) for m in LINK.finditer(outside(text))}


def outside(text: str) -> str:
    """The text without its code."""
    return FENCE.sub("", text)


def shown(path: str) -> str:
    """The Markdown that shows a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        rows = [f"- [{f.name}]({posixpath.basename(page_of(f'{path}/{f.name}'))}){_first(f)}" for f in _listed(file)]
        return f"# {path}\n\n" + "\n".join(rows) + "\n"
    text = file.read_text(encoding="utf-8")
    return text if file.suffix == ".md" else f"# {path}\n\n````{file.suffix[1:]}\n{text.rstrip()}\n````\n"


def _listed(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".py", ".ipynb", ".yaml", ".md"))


def _first(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.suffix == ".py" else None
    return f": {text.splitlines()[0]}" if text else ""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home and, again and again, what the pages link to outside docs/."""
    _paths.clear()
    waiting = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples"]
    for file in files.documentation_pages():
        path = f"docs/{file.src_uri}"
        _paths[file.src_uri] = path
        waiting += targets(file.content_string, path)
    while waiting:
        path = waiting.pop()
        uri = page_of(path)
        if files.get_file_from_path(uri) is not None or path.startswith("docs/") or not (ROOT / path).exists():
            continue  # mkdocs itself complains about what is not there
        if uri.endswith(".md"):
            text = shown(path)
            files.append(File.generated(config, uri, content=text))
            _paths[uri] = path
            folder = (ROOT / path).is_dir()
            waiting += [f"{path}/{f.name}" for f in _listed(ROOT / path)] if folder else []
            waiting += targets(text, path) if path.endswith(".md") else []
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    path = _paths[here]
    if not path.endswith(".md"):
        return markdown

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        return posixpath.relpath(page_of(target), posixpath.dirname(here) or ".") + (match[2] or "")

    pieces, end = [], 0
    for code in FENCE.finditer(markdown):
        pieces += [LINK.sub(turned, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, LINK.sub(turned, markdown[end:])])
