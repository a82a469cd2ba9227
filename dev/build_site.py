"""What mkdocs.yml's site has beside docs/: pages made of the source, files of the repository that a page links to, and
mathematics as MathML, which browsers show without a script. It is a module of MkDocs hooks.

A page made here is under `commands/`, or is `api.md`; a file from outside docs/ is under `repo/`, at its own path.
"""

import argparse
import html
import importlib
import json
import posixpath
import re
from pathlib import Path

import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure import StructureItem
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from parsers import parser_of

REPO = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".bib": "bibtex", "": "text"}


# --- files of the repository


def links_of(text: str, source: str) -> dict[str, str]:
    """Returns the links of a page to files of the repository, by what they resolve to: {"](../a.py": "a.py"}."""
    without_code = re.sub(r"^(```|~~~).*?^\1|^    .*?$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    found = {}
    for link in LINK.finditer(without_code):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if (REPO / target).exists():
            found[link[2]] = target
    return found


def place_of(path: str) -> str:
    """Returns where a file of the repository stands in the site's sources."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (REPO / path).is_dir():
        return f"repo/{path}/index.md"
    return f"repo/{path}" if path.endswith((".md", ".png")) else f"repo/{path}.md"


def text_of(path: str) -> str:
    """Returns the page that shows a file or folder of the repository."""
    file = REPO / path
    if file.is_dir():
        names = sorted(f"{one.name}" for one in file.iterdir() if one.is_file())
        return f"# {path}\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    text = file.read_text("utf-8")
    if path.endswith(".md"):
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a model card's metadata
    if path.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(code if kind == "markdown" else f"```python\n{code}\n```" for kind, code in cells)
    return (
        f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"
    )


SOURCES: dict[str, str] = {}  # of a page in the site to its path in the repository


def add_repository(files: Files, config: MkDocsConfig) -> None:
    """Adds the files that pages or the navigation name, and those that these name."""
    SOURCES.clear()
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += re.findall(r"repo/(\S+\.md)", (REPO / "mkdocs.yml").read_text("utf-8"))
    while waiting:
        path = waiting.pop()
        place = place_of(path)
        if place in SOURCES or path == "README.md":
            continue
        SOURCES[place] = path
        if path.endswith(".png"):
            files.append(File.generated(config, place, abs_src_path=str(REPO / path)))
            continue
        text = text_of(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, place, content=text))
        if path.endswith(".md"):
            waiting += links_of(text, path).values()
        elif (REPO / path).is_dir():
            waiting += [f"{path}/{one.name}" for one in (REPO / path).iterdir() if one.is_file()]


def relink(text: str, place: str) -> str:
    """Returns a page with its links to files of the repository turned to where these are in the site."""
    source = SOURCES[place]
    folder = source if (REPO / source).is_dir() else posixpath.dirname(source)
    targets = links_of(text, f"{folder}/x" if folder else "x")

    def turned(link: re.Match[str]) -> str:
        if link[2] not in targets:
            return link[0]
        turned_to = posixpath.relpath(place_of(targets[link[2]]), posixpath.dirname(place) or ".")
        return f"{link[1]}{turned_to}{link[3] or ''})"

    return LINK.sub(turned, text)


# --- the command line and the public names


def escaped(text: str) -> str:
    """Returns text that Markdown leaves as it is."""
    return re.sub(r"([*_])", r"\\\1", html.escape(text, quote=False))


def option_rows(group: argparse._ArgumentGroup) -> list[str]:
    """Returns the entries of a list: an option, what it does, its default."""
    rows = []
    for action in group._group_actions:
        if action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        said = " ".join((action.help or "").split()).replace("%(default)s", str(action.default)).replace("%%", "%")
        said = "".join(part if part.startswith("`") else escaped(part) for part in re.split("(`[^`]*`)", said))
        if action.choices:
            said += " One of " + ", ".join(f"`{choice}`" for choice in action.choices) + "."
        name = f"`{action.option_strings[0]}`" if action.option_strings else action.dest.upper()
        if action.default not in (None, "", argparse.SUPPRESS):
            said += f" Default: `{action.default}`."
        rows.append(f"{name}\n:   {said.strip() or name}\n")
    return rows


def command_page(command: str) -> str:
    """Returns a command's page: what it does, examples and exit codes, then every option."""
    parser = parser_of(command)
    parts = [f"# dpo-peft {command}", parser.description or "", f"```text\n{parser.format_usage().strip()}\n```"]
    parts += [f"```text\n{parser.epilog}\n```"]
    for group in parser._action_groups:
        if rows := option_rows(group):
            title = (group.title or "options").rstrip(":")
            parts.append("\n".join([f"## {title}", "", *rows]))
    return "\n\n".join(parts) + "\n"


def commands_index() -> str:
    """Returns the page that lists the commands."""
    from dpo_peft.cli import COMMANDS, USAGE

    rows = "\n".join(f"- [dpo-peft {command}]({command}.md)" for command in COMMANDS)
    return f"# Commands\n\nThese pages are made of the commands' own help.\n\n```text\n{USAGE}\n```\n\n{rows}\n"


def api_page() -> str:
    """Returns the page of the public names, which mkdocstrings fills."""
    import dpo_peft

    names = [name for name in dpo_peft.__all__ if not name.startswith("__")]
    modules = "losses planning pairs merge hub report".split()
    parts = [
        "# Python\n\nThe names of `dpo_peft`, and below them what the chapters offer. "
        "Shape suffixes, units and errors are said in each docstring."
    ]
    for name in names:
        parts.append(f"::: {getattr(dpo_peft, name).__module__}.{name}")
    for module in modules:
        package = importlib.import_module(f"dpo_peft.{module}")
        for name in getattr(package, "__all__", []):
            one = getattr(package, name)
            if callable(one) and name not in names:
                parts.append(f"::: {one.__module__}.{one.__name__}")
    return "\n\n".join(parts) + "\n"


# --- hooks


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the commands into the navigation."""
    from dpo_peft.cli import COMMANDS

    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    commands = [{command: f"commands/{command}.md"} for command in COMMANDS]
    reference[0] = {"Commands": [{"All": "commands/index.md"}, *commands]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    from dpo_peft.cli import COMMANDS

    add_repository(files, config)
    font = str(Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf")  # a font that knows mathematics
    files.append(File.generated(config, "assets/STIXTwoMath-Regular.ttf", abs_src_path=font))
    made = {f"commands/{command}.md": command_page(command) for command in COMMANDS}
    made |= {"commands/index.md": commands_index(), "api.md": api_page()}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turns links, and gives indented code of a shell no language of its own."""
    return relink(markdown, page.file.src_uri) if page.file.src_uri in SOURCES else markdown


MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NAMED = re.compile(r"(<mi>(?:log|exp)</mi>)(?!<mo[^>]*>(?:&#x00028;|\())")
SIGN = re.compile(r"(<mo[^>]*>(?:&#x0003D;|&#x00028;|&#x0003E;|&#x0002C;|\(|\[)</mo>)<mo>&#x02212;</mo>")
LIMIT = re.compile(r"<msub>(<mo>(?:max|min)</mo>.*?)</msub>", re.DOTALL)


def mathml(found: re.Match[str]) -> str:
    """Returns an equation as MathML, with its number beside it; the search leaves it out."""
    latex = html.unescape(found[2]).replace("{aligned}", "{align*}")
    number = re.search(r"\\tag\{(\d+)\}", latex)
    kind = "block" if found[1] == "div" else "inline"
    made = convert(re.sub(r"\\tag\{\d+\}", "", latex).strip(), display=kind)
    made = NAMED.sub(r'\1<mspace width="0.17em" />', made)  # a name of a function, and what it is taken of
    made = SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', made)  # a sign, and no difference
    if kind == "block":
        made = LIMIT.sub(r"<munder>\1</munder>", made)
    shown = f'<a class="number" href="#eq-{number[1]}">({number[1]})</a>' if number else ""
    name = f"formula {kind}" if kind == "block" else "formula"
    return f'<{found[1]} class="{name}" data-search-exclude>{made}{shown}</{found[1]}>'


def on_page_content(html: str, **_: object) -> str:
    """Turns LaTeX into MathML."""
    return MATH.sub(mathml, html)


def pages_of(item: StructureItem) -> list[Page]:
    """Returns the pages of a part of the navigation, in order."""
    return [item] if isinstance(item, Page) else [page for child in item.children or [] for page in pages_of(child)]


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Writes llms.txt: the navigation, with the address of each page's source."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for item in nav.items:
        lines += [f"## {item.title}", ""] if item.children else []
        lines += [f"- [{page.title}]({page.file.dest_uri})" for page in pages_of(item)]
        lines += [""]
    files.append(File.generated(config, "llms.txt", content="\n".join(lines)))
