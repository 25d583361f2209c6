"""Learning-rate curves as an extension point: the interface of a shape, its options in a job, and the registry.

A shape is a `Curve` and a subclass of `LrSpec` that declares its options. Other distributions add shapes through the
entry-point group `keepwarm.curves`, whose names are the values of `lr.schedule`. Torch-free.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from pydantic import Field, GetCoreSchemaHandler, PositiveFloat, ValidationError
from pydantic_core import InitErrorDetails, core_schema

from keepwarm.options import validated
from keepwarm.registry import Registry, UnknownName, UnusableComponent
from keepwarm.section import Section
from keepwarm.trainer.errors import CheckpointError

DEFAULT_SCHEDULE = "cosine"


def _of_its_shape(
    value: Any, handler: core_schema.ValidatorFunctionWrapHandler, info: core_schema.ValidationInfo
) -> Any:
    """Validate a clause as the options of its shape."""
    if not isinstance(value, dict):
        return handler(value)
    options = _curve_named(_schedule(value)).Options
    return validated(options, value, info.mode)


class LrSpec(Section):
    """The learning-rate section of a stage. Fractions are of the stage's steps.

    Validating this class returns the options of the shape that `schedule` names, which declare the remaining keys.
    """

    schedule: str = Field(DEFAULT_SCHEDULE, description="shape of the curve; determines the remaining keys")
    max: PositiveFloat = Field(description="peak rate, reached after the warm-up")

    @abstractmethod
    def curve(self, steps: int) -> "Curve":
        """Return the curve for a stage of `steps` steps, with every boundary resolved to a step."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema = handler(source)
        # The options of a shape validate themselves.
        is_any = Section in cls.__bases__
        return core_schema.with_info_wrap_validator_function(_of_its_shape, schema) if is_any else schema

    @classmethod
    def variant(cls, values: Any) -> type[Section]:
        if cls is LrSpec and isinstance(values, dict):
            return next((curve.Options for name, curve in CURVES.usable() if name == _schedule(values)), cls)
        return cls

    @classmethod
    def unknown_key(cls, key: str, values: Any) -> str | None:
        owners = [name for name, curve in CURVES.usable() if key in curve.Options.model_fields]
        if not owners:
            return None
        have = "schedule {} has it" if len(owners) == 1 else "schedules {} have it"
        return f"for schedule {_schedule(values)}; {have.format(', '.join(owners))}"


@dataclass(frozen=True, kw_only=True)
class Curve(ABC):
    """The learning rate of a stage as a pure function of its step; its fields are saved with the training state.

    Fields are plain values that JSON holds; a shape with others overrides `save` and `load`.
    """

    Options: ClassVar[type[LrSpec]]
    """Options of this shape; their `curve` method builds it."""

    kind: str
    """Name of the shape in the registry."""
    end: int
    """Steps in the stage."""

    @abstractmethod
    def at(self, step: int) -> float:
        """Return the learning rate at step `step` of the stage, counted from 0; constant after `end`."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Steps of the stage at which a new phase of the curve begins; plots show them exactly."""
        return ()

    @property
    def corners(self) -> tuple[int, ...]:
        """Steps that a plot must include: both ends, and each boundary with the step before it."""
        inner = {at for at in self.boundaries if 0 < at < self.end}
        return tuple(sorted({0, *(at + offset for at in inner for offset in (-1, 0)), self.end - 1}))

    @classmethod
    def load(cls, saved: dict[str, Any]) -> Self:
        """Restore a curve from what `save` returned, ignoring other keys. Raises KeyError if a key is missing."""
        return cls(**{field.name: saved[field.name] for field in fields(cls)})

    def save(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


class AnnealableCurve(Curve):
    """A curve with a constant-rate phase, from which `keepwarm branch` can branch off models."""

    @property
    @abstractmethod
    def constant_phase(self) -> range:
        """Completed-step counts of the stage after which the rate is constant; empty if there are none.

        An anneal started at any of them continues the curve without a jump.
        """

    @abstractmethod
    def anneal(self) -> dict[str, Any]:
        """Return the `lr` section of a stage that continues from the constant phase and decays over all its steps."""


CURVES: Registry[type[Curve]] = Registry(
    "learning-rate schedule",
    "keepwarm.curves",
    {
        "constant": f"{__package__}.learning_rate:Constant",
        "linear": f"{__package__}.learning_rate:Linear",
        "cosine": f"{__package__}.learning_rate:Cosine",
        "inverse_sqrt": f"{__package__}.learning_rate:InverseSqrt",
        "wsd": f"{__package__}.learning_rate:Wsd",
        "infinite": f"{__package__}.learning_rate:Infinite",
        "piecewise": f"{__package__}.learning_rate:Piecewise",
    },
    Curve,
)


def load_curve(saved: dict[str, Any]) -> Curve:
    """Restore a saved curve of any shape.

    Raises:
        CheckpointError: no installed package provides its shape.
        KeyError: a value is missing.
    """
    try:
        return CURVES.get(saved["kind"]).load(saved)
    except (UnknownName, UnusableComponent) as error:
        raise CheckpointError(f"the saved learning-rate curve cannot be continued: {error}") from error


def annealable() -> list[str]:
    """Return the names of the shapes with a constant phase to branch from."""
    return [name for name, curve in CURVES.usable() if issubclass(curve, AnnealableCurve)]


def _schedule(values: dict[str, Any]) -> Any:
    return values.get("schedule", DEFAULT_SCHEDULE)


def _curve_named(name: Any) -> type[Curve]:
    if isinstance(name, str) and name in CURVES:
        try:
            return CURVES.get(name)
        except UnusableComponent as error:
            raise ValueError(str(error)) from error
    *others, last = map(repr, CURVES.names())
    wrong = InitErrorDetails(
        type="literal_error", loc=("schedule",), input=name, ctx={"expected": f"{', '.join(others)} or {last}"}
    )
    raise ValidationError.from_exception_data(LrSpec.__name__, [wrong])
