"""The options of moss-jt convert that quantize."""

from dataclasses import dataclass, replace
from pathlib import Path

import click

from moss_jt.convert.calibration_text import calibration_tokens
from moss_jt.convert.pipeline import Recipe, Source
from moss_jt.convert.quantize import QuantSettings, Report, default_group_size, quantized_recipe
from moss_jt.errors import MossError


@dataclass(frozen=True)
class QuantOptions:
    """As given on the command line; None where an option was left out, and no bits.

    bits  in which the model is wanted, most first: "16", "8", "4"
    """

    bits: tuple[str, ...]
    method: str | None
    group_size: int | None
    calibration: Path | None
    act_order: bool

    def __post_init__(self) -> None:
        given = self.method or self.group_size or self.calibration or self.act_order
        if given and not self.quantizes:
            raise click.UsageError(
                "--method, --group-size, --calibration and --act-order go with --bits 4 or --bits 8."
            )
        if (self.calibration or self.act_order) and self.chosen_method != "gptq":
            raise click.UsageError("--calibration and --act-order go with --method gptq.")

    @property
    def quantizes(self) -> bool:
        return self.bits[-1:] in (("4",), ("8",))

    def each(self) -> "list[QuantOptions]":
        """The same for one number of bits after the other, most first; the plain float16 model has no options."""
        plain = QuantOptions(("16",), None, None, None, False)
        return [plain if bits == "16" else replace(self, bits=(bits,)) for bits in self.bits]

    @property
    def chosen_method(self) -> str:
        return self.method or ("gptq" if self.bits[-1:] == ("4",) else "rtn")

    def folder(self, float16: Path) -> Path:
        """Where the model goes by default: beside its float16 form, with the bits in its name."""
        return float16.with_name(f"{float16.name}-int{self.bits[-1]}") if self.quantizes else float16

    def apply(self, source: Source, recipe: Recipe, out: Path, report: Report) -> Recipe:
        """The recipe that these options ask for; while it is followed, ``report`` is told what is being worked on.

        Raises:
            MossError: the source is quantised already, the group size does not fit, or the calibration text is no good.
        """
        if not self.quantizes:
            if self.bits and recipe.bits != 16:
                raise MossError(
                    f"{recipe.source} is int{recipe.bits}: what quantization lost does not come back. Leave out --bits."
                )
            return recipe
        size = default_group_size(source.config) if self.group_size is None else self.group_size
        settings = QuantSettings(int(self.bits[-1]), size, self.chosen_method, self.act_order)
        token_ids = None
        if settings.method == "gptq":
            token_ids = calibration_tokens(source.tokenizer_text(), self.calibration)
        return quantized_recipe(recipe, source.config, settings, out, token_ids, report)
