"""Translation of weight names in both directions, by a table of rules.

Exactly one rule must match a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindspeed_mm.errors import WeightsError

FIELDS = {"i": r"\d+", "p": r"weight|bias", "qkv": r"[qkv]"}


@dataclass(frozen=True)
class Rename:
    """One rule, such as `blocks.{i}.self_attn.q.{p}` ⇄ `blocks.{i}.attn1.to_q.{p}`.

    {i} matches an index, {p} `weight` or `bias`, and {qkv} one of the letters q, k and v.
    """

    ours: str
    theirs: str


class KeyMap:
    """Translates between official names (`ours`) and the names of one other dialect (`theirs`)."""

    def __init__(self, dialect: str, rules: Iterable[Rename]) -> None:
        self.dialect = dialect
        self.rules = tuple(rules)
        self._forward = [(_pattern(rule.ours), rule.theirs) for rule in self.rules]
        self._backward = [(_pattern(rule.theirs), rule.ours) for rule in self.rules]

    def to_theirs(self, name: str) -> str:
        """Translate an official name. Raises WeightsError unless exactly one rule matches."""
        return self._translate(name, self._forward, f"has no name in the {self.dialect} dialect")

    def to_ours(self, name: str) -> str:
        """Translate a name of the dialect. Raises WeightsError unless exactly one rule matches."""
        return self._translate(name, self._backward, f"is not a name of the {self.dialect} dialect")

    def knows(self, name: str) -> bool:
        """Return whether `name` is a name of the dialect."""
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
            expected="one match" if found else "",
        )


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for field, expression in FIELDS.items():
        text = text.replace(re.escape("{" + field + "}"), f"(?P<{field}>{expression})")
    return re.compile(text)
