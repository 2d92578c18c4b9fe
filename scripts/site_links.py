"""mkdocs hook: documents and pictures that lie outside of docs/ keep their place, and the site gets a copy of each.

A page links them by their real path (`../SECURITY.md`, `../benchmarks/results/speed.png`), so that the link works on GitHub
and in an editor. On the site the copy lies below `repository/`, and links are rewritten to it. A linked Markdown file
becomes a page; its own links are followed in the same way.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
COPIES = "repository"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def site_path(path: PurePosixPath) -> PurePosixPath:
    """Return where a file of the repository lies on the site, both as relative paths."""
    return path.relative_to("docs") if path.parts[0] == "docs" else PurePosixPath(COPIES) / path


def targets(page: PurePosixPath, text: str) -> set[PurePosixPath]:
    """Return the files of the repository that a page links to, by relative paths."""
    found = {PurePosixPath(os.path.normpath(page.parent / link[2])) for link in LINK.finditer(text)}
    return {path for path in found if (ROOT / path).is_file()}


def on_files(files: Files, config) -> Files:
    """Add what the pages link to outside of docs/."""
    pages = [PurePosixPath("docs") / file.src_uri for file in files.documentation_pages()]
    seen = set(pages)
    while pages:
        page = pages.pop()
        for path in targets(page, (ROOT / page).read_text(encoding="utf-8")) - seen:
            seen.add(path)
            if path.parts[0] != "docs":
                copy = File.generated(
                    config, str(site_path(path)), abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(copy)
            if path.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Rewrite links that leave docs/ to the copies."""
    here = PurePosixPath(page.file.src_uri)
    source = here.relative_to(COPIES) if here.parts[0] == COPIES else PurePosixPath("docs") / here

    def rewritten(link: re.Match[str]) -> str:
        path = PurePosixPath(os.path.normpath(source.parent / link[2]))
        if not (ROOT / path).is_file():
            return link[0]
        relative = os.path.relpath(site_path(path), here.parent)
        return f"{link[1]}{relative}{link[3] or ''}{link[4]}"

    return LINK.sub(rewritten, markdown)
