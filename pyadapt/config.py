"""Adapter configurations: what is adapted, how, and how it is written to `adapter_config.json`.

The file format is that of Hugging Face PEFT. A configuration is never changed after it was made: what `wrap`
derives from it (default targets, the classification head to save) is derived again each time.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .dtypes import ADAPTER_DTYPES, LIKE_BASE

ADAPTER_CONFIG_FILE = "adapter_config.json"
# The version of PEFT whose file layout is written.
PEFT_FORMAT_VERSION = "0.21.2"

ConfigT = TypeVar("ConfigT", bound="AdapterConfig")


class TaskType(str, enum.Enum):
    """What the model is trained for; decides which head is trained and saved beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Heads that a task trains from scratch, so that they belong to the adapter.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

# The transformers class that loads a model for a task.
AUTO_CLASSES: dict[TaskType, str] = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


@dataclass
class AdapterConfig:
    """What every method's configuration has.

    Attributes:
        task_type: a `TaskType` or its name; None leaves heads alone.
        base_model_name_or_path: where the base model came from; filled in when saved.
        revision: hub revision of the base model.
        inference_mode: written true in files, as PEFT does; a loaded adapter is frozen unless asked otherwise.
        adapter_dtype: dtype of the adapter's weights: "float32", "bfloat16", "float16", "float64" (or the torch dtype),
            "base" for that of the weight it adapts; None is float32, over a float64 weight float64. Files leave it out.
    """

    peft_type: ClassVar[str] = ""
    # Keys of PEFT's file that this method has no use for, with the one value that changes nothing.
    neutral_keys: ClassVar[dict[str, Any]] = {}
    # Fields that say how an adapter runs here, not what it is: left out of files.
    runtime_keys: ClassVar[tuple[str, ...]] = ("adapter_dtype",)

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    adapter_dtype: str | None = None

    def __post_init__(self) -> None:
        self.adapter_dtype = _dtype_name(self.adapter_dtype)
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                names = ", ".join(task.value for task in TaskType)
                raise ValueError(f"task_type={self.task_type!r} is not one of {names}") from None

    def check_counts(self, *options: str) -> None:
        """Refuse options that are given, and are no whole numbers of at least 1."""
        for name in options:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")

    def replaced(self: ConfigT, **changes: Any) -> ConfigT:
        """A copy with other values; keys that this method lacks are passed over."""
        known = {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Every key that PEFT writes for this method, JSON-ready; sets come out sorted."""
        fields = [field.name for field in dataclasses.fields(self) if field.name not in self.runtime_keys]
        own = {name: _to_json(getattr(self, name)) for name in fields}
        written = {
            **self.neutral_keys,
            **own,
            "peft_type": self.peft_type,
            "peft_version": PEFT_FORMAT_VERSION,
        }
        return dict(sorted(written.items()))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into `folder` (made if missing), marked for inference as PEFT does."""
        from .files import write_text

        os.makedirs(folder, exist_ok=True)
        text = json.dumps({**self.to_dict(), "inference_mode": True}, indent=2, sort_keys=True)
        write_text(os.path.join(folder, ADAPTER_CONFIG_FILE), text + "\n")

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Make a configuration from plain values; on the base class, `peft_type` picks the method.

        Raises:
            ValueError: an unknown or unsupported key (with the nearest known one), or a bad value.
        """
        values = {("peft_type" if key == "pet_type" else key): value for key, value in values.items()}
        peft_type = values.pop("peft_type", cls.peft_type or None)
        peft_type = getattr(peft_type, "value", peft_type)
        values.pop("peft_version", None)
        target = _config_class(peft_type)
        if not issubclass(target, cls):
            raise ValueError(f"peft_type {peft_type!r} makes a {target.__name__}, not a {cls.__name__}")
        known = {field.name for field in dataclasses.fields(target)}
        for key in list(values):
            if key in known:
                continue
            if key not in target.neutral_keys:
                raise ValueError(_unknown_key(key, target, known))
            if values[key] not in (target.neutral_keys[key], None, False):
                raise ValueError(f"{key}={values[key]!r}: {target.__name__} of this version has no such option")
            del values[key]
        return target(**values)

    @classmethod
    def from_json(cls: type[ConfigT], source: str | os.PathLike[str]) -> ConfigT:
        """From a JSON file, or from JSON text that starts with a brace."""
        return cls.from_dict(_parse(source, json.loads, "JSON"))

    @classmethod
    def from_yaml(cls: type[ConfigT], source: str | os.PathLike[str]) -> ConfigT:
        """From a YAML file, or from YAML text of more than one line."""
        import yaml

        return cls.from_dict(_parse(source, yaml.safe_load, "YAML"))

    @classmethod
    def from_peft(cls: type[ConfigT], config: Any) -> ConfigT:
        """From a `peft.PeftConfig` object; options that pyadapt lacks are an error unless they are off."""
        values = {key: _to_json(value) for key, value in config.to_dict().items()}
        values.pop("runtime_config", None)  # how peft runs, not what is adapted; peft leaves it out of files too
        return cls.from_dict(values)

    @classmethod
    def from_pretrained(cls: type[ConfigT], path: str | os.PathLike[str], **hub: Any) -> ConfigT:
        """From an adapter folder or hub name that holds `adapter_config.json`."""
        from .files import resolve_adapter_folder

        return cls.from_json(os.path.join(resolve_adapter_folder(path, **hub), ADAPTER_CONFIG_FILE))


def as_config(config: Any) -> AdapterConfig:
    """Accept what users hold: a configuration, a dict, a path to JSON or YAML, or a `peft` configuration."""
    if isinstance(config, AdapterConfig):
        if not config.peft_type:
            raise TypeError(f"{type(config).__name__} names no method; use LoraConfig or another method's")
        return config
    if isinstance(config, Mapping):
        return AdapterConfig.from_dict(config)
    if isinstance(config, (str, os.PathLike)):
        name = os.fspath(config)
        return AdapterConfig.from_yaml(name) if name.endswith((".yaml", ".yml")) else AdapterConfig.from_json(name)
    if isinstance(config, type):
        raise TypeError(f"a configuration is a pyadapt or peft config, a dict or a path; {config.__name__} is a class")
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        return AdapterConfig.from_peft(config)
    raise TypeError(f"a configuration is a pyadapt or peft config, a dict or a path, not {type(config).__name__}")


def _config_class(peft_type: str | None) -> type[AdapterConfig]:
    from .methods import METHODS

    if peft_type is None:
        raise ValueError(f"the configuration has no peft_type; one of {', '.join(sorted(METHODS))} is needed")
    if peft_type not in METHODS:
        raise ValueError(f"peft_type {peft_type!r} is not one of {', '.join(sorted(METHODS))}")
    return METHODS[peft_type].config_class


def _unknown_key(key: str, target: type[AdapterConfig], known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{target.__name__} has no key {key!r}{hint}"


def _dtype_name(dtype: Any) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name != LIKE_BASE and name not in ADAPTER_DTYPES:
        raise ValueError(f"adapter_dtype={dtype!r} is not one of {', '.join([*ADAPTER_DTYPES, LIKE_BASE])}")
    return name


def _parse(source: str | os.PathLike[str], parser: Any, kind: str) -> Mapping[str, Any]:
    text = os.fspath(source)
    where = f"the {kind} text"
    if not (text.lstrip().startswith("{") or "\n" in text):
        where = text
        with open(source, encoding="utf-8") as file:
            text = file.read()
    try:
        values = parser(text)
    except Exception as error:
        raise ValueError(f"{where} is not valid {kind}: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} holds a {type(values).__name__}, not a mapping of keys to values")
    return values


def _to_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value
