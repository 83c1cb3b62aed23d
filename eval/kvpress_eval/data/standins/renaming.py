"""Python code under other names, so that it cannot be completed from memory alone."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize

_SYLLABLES = ["ba", "co", "di", "fe", "ga", "ho", "ju", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "vo"]


def renamed(text: str) -> str:
    """The code with every name that it defines replaced wherever it stands outside of strings and comments.

    Names of what is imported, names with two underscores in front and those of up to two letters stay. New names keep
    underscores in front and capital letters, and no two names get the same. Keyword arguments and attributes of other modules'
    objects change with the names that they share, so the code need not run any more. Code that does not parse comes back as
    it is.
    """
    try:
        names = _replacements(_defined(ast.parse(text)))
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return text
    lines = text.split("\n")
    for token in reversed(tokens):  # from the end, so that columns in front stay right
        if token.type == tokenize.NAME and token.string in names:
            row, column = token.start[0] - 1, token.start[1]
            lines[row] = lines[row][:column] + names[token.string] + lines[row][token.end[1] :]
    return "\n".join(lines)


def _defined(tree: ast.AST) -> set[str]:
    """Names that are assigned, or are those of functions, classes and parameters, less those that are imported."""
    defined: set[str] = set()
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {part for alias in node.names for part in (*alias.name.split("."), alias.asname or "")}
            imported |= set((getattr(node, "module", None) or "").split("."))
    return {
        name
        for name in defined - imported
        if len(name) > 2 and not name.startswith("__") and name not in ("self", "cls")
    }


def _replacements(names: set[str]) -> dict[str, str]:
    """A word of three or four syllables for each name."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        core = name.lstrip("_")
        attempt = 0
        while (word := _word(core, attempt)) in taken:
            attempt += 1
        taken.add(word)
        cased = word.upper() if core.isupper() else word.capitalize() if core[:1].isupper() else word
        found[name] = name[: len(name) - len(core)] + cased
    return found


def _word(name: str, attempt: int) -> str:
    digest = hashlib.sha256(f"{name}:{attempt}".encode()).digest()
    return "".join(_SYLLABLES[byte % 16] for byte in digest[: 3 + (len(name) > 8)])
