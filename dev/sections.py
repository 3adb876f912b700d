"""The sections that the training scripts share: find drift, or spread one script's version to the others.

    python dev/sections.py check                     lists every difference; exit status 1 if there is one
    python dev/sections.py copy train_rwkv7.py       gives its [shared] sections to the other scripts

A section is a rule line of dashes, a line "# Title" or "# Title [shared]", and all that follows up to the next rule.
A shared section is shared by all scripts, but for those in SHARED_BY_SOME.
"""
import difflib
import os
import re
import sys
from pathlib import Path

SHARED_BY_SOME = {"Kernel build [shared]": ("train_rwkv6.py", "train_rwkv7.py")}
ROOT = Path(__file__).resolve().parent.parent
HEAD = re.compile(r"^# -{40,}\n# (?P<title>[^\n]+)\n", re.M)


def scripts():
    return sorted(ROOT.glob("train_*.py"))


def sections(text):
    """{title: text from its rule line on} in order; the part above the first rule line is "". Raises ValueError."""
    heads = list(HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    found = {"": text[:heads[0].start()] if heads else text}
    for head, end in zip(heads, ends):
        if head["title"] in found:
            raise ValueError(f"two sections are called {head['title']!r}")
        found[head["title"]] = text[head.start():end]
    return found


def shared(text):
    return {title: body for title, body in sections(text).items() if title.endswith("[shared]")}


def sharers(title, paths):
    """The scripts of `paths` that share the section."""
    return [path for path in paths if path.name in SHARED_BY_SOME.get(title, (path.name,))]


def check(paths):
    """A list of complaints, one for each shared section that a script lacks or has otherwise than the first script."""
    complaints, parts = [], {path: shared(path.read_text(encoding="utf-8")) for path in paths}
    for title in sorted({title for part in parts.values() for title in part}):
        complaints += [f"{path.name} has the section {title!r}, which is not its own to share"
                       for path in paths if title in parts[path] and path not in sharers(title, paths)]
        bodies = {path: parts[path].get(title) for path in sharers(title, paths)}
        first = next(iter(bodies), None)
        for path in list(bodies)[1:]:
            a, b = bodies[first], bodies[path]
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
            own = {title: body for title, body in new.items() if path in sharers(title, paths)}
            if missing := own.keys() - old.keys():
                raise ValueError(f"{path.name} has no section {', '.join(sorted(missing))} to overwrite; add its title")
            text = "".join({**old, **own}[title] for title in old)
            temporary = path.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
            print(f"{path.name}: {len(own)} shared sections written")


def main():
    try:
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
