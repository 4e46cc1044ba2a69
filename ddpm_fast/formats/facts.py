"""What is known of a model, in words: what the commands say of it, and what its page on the Hub does."""

from __future__ import annotations

from ddpm_fast.errors import printable
from ddpm_fast.files.loaded_model import LoadedModel

_NAMED = 10  # of many classes, so many are named
_ORIGIN = {"format": "", "file": "file ", "hub": "", "commit": "commit ", "flags": "flags ", "sha256": "SHA-256 "}


def facts(loaded: LoadedModel) -> dict[str, str]:
    """The facts, by what each is about. Texts that come from files are safe to show."""
    schedule, objective = loaded.diffusion.schedule.to_dict(), loaded.diffusion.objective
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    found = {
        "Network": f"{loaded.network_name}, {parameters:,} parameters",
        "Samples": "x".join(map(str, loaded.shape)) + _values(loaded),
        "Classes": _classes(loaded),
        "Diffusion": f"{loaded.diffusion.num_timesteps} timesteps, {schedule['kind']} schedule; predicts "
        f"{objective.prediction}, variance {objective.variance}",
        "Trained": _training(loaded),
        "Averaged": _average(loaded),
        "From": _origin(loaded),
    }
    return {name: printable(text) for name, text in found.items() if text}


def _values(loaded: LoadedModel) -> str:
    if loaded.value_range is None:
        return ""
    return f", floats in {', '.join(map(repr, loaded.value_range.ends))}"


def _classes(loaded: LoadedModel) -> str:
    if not loaded.classes:
        return "none"
    names = loaded.label_names or []
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    null = "" if loaded.has_null_class else ", no null class"
    return f"{loaded.classes}{f' ({listed})' if names else ''}{null}"


def _training(loaded: LoadedModel) -> str:
    """What a file of ours says about its training."""
    training = loaded.config.get("training") or {}
    words = {"data": "on {}", "steps": "{} steps", "batch_size": "of {} images", "precision": "in {}"}
    said = [form.format(training[name]) for name, form in words.items() if isinstance(training.get(name), str | int)]
    return ", ".join(said)


def _average(loaded: LoadedModel) -> str:
    """What a file says of an average of the weights that was chosen by its width."""
    about = loaded.config.get("average")
    width = about.get("width") if isinstance(about, dict) else None
    return f"with the width {width:g}" if isinstance(width, float) else ""


def _origin(loaded: LoadedModel) -> str:
    said = loaded.origin
    return ", ".join(f"{before}{said[name]}" for name, before in _ORIGIN.items() if isinstance(said.get(name), str))
