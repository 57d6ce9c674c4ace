"""Weight names are tables, read both ways. Exactly one rule may match a name; none or two is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindspeed_mm.errors import WeightsError

FIELDS = {"i": r"\d+", "p": r"weight|bias", "qkv": r"[qkv]"}


@dataclass(frozen=True)
class Rename:
    """`blocks.{i}.self_attn.q.{p}` ⇄ `blocks.{i}.attn1.to_q.{p}`.

    {i} is an index, {p} weight or bias, {qkv} one letter.
    """

    ours: str
    theirs: str


class KeyMap:
    """The names of one outside dialect. `ours` are the official checkpoint's names."""

    def __init__(self, dialect: str, rules: Iterable[Rename]) -> None:
        self.dialect = dialect
        self.rules = tuple(rules)
        self._forward = [(_pattern(rule.ours), rule.theirs) for rule in self.rules]
        self._backward = [(_pattern(rule.theirs), rule.ours) for rule in self.rules]

    def to_theirs(self, name: str) -> str:
        """Our name → theirs. Raises WeightsError when no rule or more than one matches."""
        return self._translate(name, self._forward, f"has no name in the {self.dialect} dialect")

    def to_ours(self, name: str) -> str:
        """Their name → ours. Raises WeightsError when no rule or more than one matches."""
        return self._translate(name, self._backward, f"is not a name of the {self.dialect} dialect")

    def knows(self, name: str) -> bool:
        """Whether `name` is one of theirs."""
        return any(pattern.fullmatch(name) for pattern, _ in self._backward)

    def _translate(self, name: str, table: Sequence[tuple[re.Pattern[str], str]], complaint: str) -> str:
        found = [
            template.format(**match.groupdict())
            for pattern, template in table
            if (match := pattern.fullmatch(name))
        ]
        if len(found) == 1:
            return found[0]
        raise WeightsError(
            complaint if not found else f"matches {len(found)} rules: {found}",
            where=f"weight {name!r}",
            expected="one" if found else "",
        )


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for field, expression in FIELDS.items():
        text = text.replace(re.escape("{" + field + "}"), f"(?P<{field}>{expression})")
    return re.compile(text)
