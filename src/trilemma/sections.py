"""The base of all sections of a configuration, and the small sections that stand within larger ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


def _each_once(values: list[int]) -> list[int]:
    if len(set(values)) != len(values):
        raise ValueError(f"each may be given once, found {values}")
    return values


# Lists of a study: their items are held to the bounds that a single value has elsewhere.
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_each_once)]
Counts = list[Annotated[int, Field(ge=1)]]
Rates = list[Annotated[float, Field(gt=0)]]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take True for 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            kinds = {annotation, *get_args(annotation)}
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"a number is needed, found {str(value).lower()}")
        return value


class SplitConfig(Section):
    """`data.split`: shares of the training sources that become the valid and test splits."""

    valid: float = Field(0.0, ge=0, lt=1)
    test: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_some(self) -> SplitConfig:
        if not 0 < self.valid + self.test < 1:
            raise ValueError("valid and test are shares of the training data; together above 0 and below 1")
        return self


class QualityConfig(Section):
    """`training.quality`: a metric on valid while training; the best checkpoint and patience go by it."""

    metric: Literal["bleu", "chrf", "exact_match", "accuracy"]
    every: int | None = Field(None, ge=1, description="steps; None: at every validation")
    examples: int | None = Field(None, ge=1, description="as many of the valid split, evenly spread; None: all")
    decoding: Literal["greedy", "configured"] = Field("greedy", description="configured: as the section decoding says")
