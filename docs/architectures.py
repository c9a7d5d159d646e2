"""Writes the table of docs/architectures.md from what operators and families say of themselves.

    python docs/architectures.py            # or: make docs

Every cell is found by planning: the operator's smallest step on a small model of the family, without memory.
Where that is refused the cell says so and the reason stands below. A test says when the page is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cambia.models.causal_lm  # noqa: F401 (registers the native family)
from cambia.config import resolve
from cambia.errors import GrowthError
from cambia.growth import OPERATORS, GrowthPlan, Operator, WidenHidden, WidenLoraRank, plan_growth
from cambia.growth.operators import PartOperator
from cambia.models.architectures import ARCHITECTURES
from cambia.models.bodies import on_meta

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- made by docs/architectures.py -->\n", "<!-- end -->\n"
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CLONE = 'initial="clone"'
SIGNS = {"tolerance": "exact", "old tokens": "exact for old tokens", "none": "jumps"}


def model_of(family: str) -> PreTrainedModel:
    """A small model without memory."""
    sizes = {key: value for key, value in SIZES.items() if family != "gpt2" or key != "head_dim"}
    config = AutoConfig.for_model(family, **sizes)
    return on_meta(type(AutoModelForCausalLM.from_config(config)), config)


def operators() -> list[Operator]:
    """Every operator with its defaults, and the second form of the one that has two kinds of arithmetic."""
    found = [resolve(name, OPERATORS, "operator")() for name in OPERATORS]
    found = [operator for operator in found if not isinstance(operator, WidenLoraRank | PartOperator)]
    return [*found, WidenHidden(initial="clone")]


def cell(model: PreTrainedModel, plan: GrowthPlan) -> str:
    """What a plan promises, and the sizes that it changes, by Llama's names for them."""
    table = ARCHITECTURES[model.config.model_type]
    sizes = [
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_size",
        "rms_norm_eps",
        "vocab_size",
    ]
    changes = []
    for name in sizes:
        old, new = table.size(model.config, name), table.size(plan.config, name)
        if old != new and (table.head_dim_apart or name != "num_key_value_heads"):
            changes.append(f"{WORDS[name]} {_short(old)} → {_short(new)}")
    return f"{SIGNS[plan.contract.exactness]}: {', '.join(changes)}"


WORDS = {
    "intermediate_size": "FFN",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head size",
    "hidden_size": "hidden size",
    "rms_norm_eps": "epsilon",
    "vocab_size": "vocabulary",
}


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table() -> str:
    """The table, operators down and families across, and the reasons of what is refused."""
    reasons: list[str] = []
    columns = {family: tuple(_column(model_of(family), reasons)) for family in ARCHITECTURES}
    # Families of which all is the same stand in one column.
    groups = {column: [f for f in columns if columns[f] == column] for column in columns.values()}
    lines = [
        "| operator | rescales | awake at step | "
        + " | ".join(", ".join(families) for families in groups.values())
        + " |",
        "|---" * (3 + len(groups)) + "|",
    ]
    for i, operator in enumerate(operators()):
        contract = operator.contract
        rescales = "yes" if contract.rescales else "no"
        cells = " | ".join(column[i] for column in groups)
        lines.append(f"| `{_said(operator)}` | {rescales} | {contract.alive_within} | {cells} |")
    notes = "\n".join(f"({i}) {reason}.\n" for i, reason in enumerate(reasons, 1))
    return "\n".join(lines) + "\n\n" + notes


def _column(model: PreTrainedModel, reasons: list[str]) -> Iterator[str]:
    """One family's cells; why something is refused goes to `reasons`."""
    for operator in operators():
        try:
            yield cell(model, plan_growth(model, operator))
        except GrowthError as error:
            if str(error) not in reasons:
                reasons.append(str(error))
            yield f"no ({reasons.index(str(error)) + 1})"


def _said(operator: Operator) -> str:
    is_clone = operator == WidenHidden(initial="clone")
    return f"{type(operator).__name__}({CLONE if is_clone else ''})"


def page() -> str:
    """The whole page: what stands outside the markers is written by hand."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
