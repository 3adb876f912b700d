"""The sections that the training scripts share: find drift, or spread one script's version to the others.

    python dev/sections.py check                     lists every difference; exit status 1 if there is one
    python dev/sections.py copy train_rwkv7.py       gives its [shared] sections to the other scripts

A section is a rule line of dashes, a line "# Title" or "# Title [shared]", and all that follows up to the next rule.
A shared section is shared by all scripts.
"""
import difflib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = re.compile(r"^# -{40,}\n# (?P<title>[^\n]+)\n", re.M)


def scripts():
    return sorted(ROOT.glob("train_*.py"))


def sections(text):
    """{title: text from its rule line on} in order; the part above the first rule line is "". Raises ValueError."""
    heads = list(HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    parts = {"": text[:heads[0].start()] if heads else text}
    for head, end in zip(heads, ends):
        if head["title"] in parts:
            raise ValueError(f"two sections are called {head['title']!r}")
        parts[head["title"]] = text[head.start():end]
    return parts


def shared(text):
    return {title: body for title, body in sections(text).items() if title.endswith("[shared]")}


def check(paths):
    """A list of complaints, one for each shared section that a script lacks or has otherwise than the first script."""
    complaints, parts = [], {path: shared(path.read_text(encoding="utf-8")) for path in paths}
    first = paths[0]
    for title in sorted({title for part in parts.values() for title in part}):
        for path in paths[1:]:
            a, b = parts[first].get(title), parts[path].get(title)
            if a is None or b is None:
                complaints.append(f"{(first if a is None else path).name} lacks the section {title!r}")
            elif a != b:
                diff = difflib.unified_diff(a.splitlines(), b.splitlines(), first.name, path.name, n=0, lineterm="")
                complaints.append(f"section {title!r} differs:\n" + "\n".join(list(diff)[:12]))
    return complaints


def copy(source, paths):
    """Give the other scripts the source's shared sections; each must already have a section of that title."""
    new = shared(source.read_text(encoding="utf-8"))
    for path in paths:
        if path != source:
            old = sections(path.read_text(encoding="utf-8"))
            if missing := new.keys() - old.keys():
                raise ValueError(f"{path.name} has no section {', '.join(sorted(missing))} to overwrite; add its title")
            text = "".join({**old, **new}[title] for title in old)
            temporary = path.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
            print(f"{path.name}: {len(new)} shared sections written")


def main():
    try:
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(__doc__.strip())
            return 0
        if sys.argv[1:] == ["check"]:
            complaints = check(scripts())
            print("\n".join(complaints) or f"{len(scripts())} scripts, shared sections identical")
            return 1 if complaints else 0
        if len(sys.argv) == 3 and sys.argv[1] == "copy":
            source = ROOT / Path(sys.argv[2]).name
            if source not in scripts():
                raise ValueError(f"{sys.argv[2]} is not one of {', '.join(path.name for path in scripts())}")
            copy(source, scripts())
            return 0
    except ValueError as error:
        print(f"sections.py: {error}", file=sys.stderr)
        return 1
    print(__doc__.strip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
