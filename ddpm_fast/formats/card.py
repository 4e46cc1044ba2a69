"""The page of a model on the Hugging Face Hub: README.md, whose head is what the Hub reads and whose rest people do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ddpm_fast.errors import InputError, printable
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.facts import facts

# A name of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses), such as mit or cc-by-4.0.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,39}")

_LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx"}  # those that the Hub knows, and reads such a repository with
_USES = {
    "ddpm_fast": """```python
import ddpm_fast as df

loaded = df.load_model("hf:{repository}")
x = df.sample(loaded.model, loaded.diffusion, 16, steps=50, seed=0{labels})  # in [-1, 1]
```

or

```bash
python -m ddpm_fast.sample --model hf:{repository} --out samples.png
```""",
    "diffusers": """```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{repository}"{trust})
images = pipeline({asked}).images
```

`ddpm_fast.load_model("hf:{repository}")` reads it as well.""",
    "openai": """The file has the names of improved- and guided-diffusion; the flags for their scripts are in the text
beside it. `ddpm_fast.load_model("hf:{repository}", flags="...")` reads it as well.""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(output,) = session.run(None, {{"x": x, "t": t{onnx_labels}}})  # x: float32 [N, {shape}], t: int64 [N]
```

The file is the network alone. The noise schedule is in its metadata, under the key `ddpm_fast`.""",
}


@dataclass(frozen=True)
class Page:
    """What a page is made of.

    Attributes:
        loaded: The model.
        repository: OWNER/NAME.
        form: What is in the repository: one of ddpm_fast, diffusers, openai, onnx.
        license: The name of a licence, as the Hub has them.
        pictures: From the name of a picture beside the page to what it shows.
        metrics: What was measured, as lines of text.
    """

    loaded: LoadedModel
    repository: str
    form: str
    license: str
    pictures: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()

    def text(self) -> str:
        """The page, in Markdown. Texts that come from files are shown as code, in which nothing is obeyed."""
        loaded = self.loaded
        known = facts(loaded)
        title = self.repository.partition("/")[2]
        parts = [
            self._head(),
            f"# {title}",
            "A denoising diffusion model (DDPM), "
            + ("as ddpm_fast keeps it." if self.form == "ddpm_fast" else "exported by ddpm_fast."),
            *(f"![{what}]({name})" for name, what in self.pictures.items()),
            "## The model",
            "\n".join(f"- {name}: {as_code(value)}" for name, value in known.items()),
        ]
        if self.metrics:
            parts += ["## Measured", "\n".join(f"- {line}" for line in self.metrics)]
        parts += ["## How to use it", self._use(), "## Configuration", self._config(), "## Licence", self.license]
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        """The metadata for the Hub, as YAML."""
        kind = "unconditional-image-generation"
        tags = ["ddpm", "diffusion", "ddpm_fast", kind]
        lines = [
            f"license: {self.license}",
            f"library_name: {_LIBRARIES.get(self.form, 'ddpm_fast')}",
            f"pipeline_tag: {kind}",
            "tags:",
        ]
        return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])

    def _use(self) -> str:
        loaded, classes = self.loaded, self.loaded.classes
        return _USES[self.form].format(
            repository=self.repository,
            labels=", labels=0" if classes else "",
            pipeline="DiffusionPipeline" if classes else "DDPMPipeline",
            trust=", trust_remote_code=True" if classes else "",  # its pipeline.py gives the labels
            asked="class_labels=[0, 1]" if classes else "batch_size=4",
            onnx_labels=', "labels": labels' if classes else "",
            shape=", ".join(map(str, loaded.shape)),
        )

    def _config(self) -> str:
        """The config, but for the history of the training and the check."""
        kept = {name: self.loaded.config.get(name) for name in ("unet", "diffusion", "training", "origin")}
        shown = {name: value for name, value in kept.items() if value}
        text = json.dumps(shown, indent=1, default=str).replace("```", "'''")
        return "```json\n" + "\n".join(map(printable, text.split("\n"))) + "\n```"


def check_license(name: str | None) -> str:
    """The name of a licence.

    Raises:
        InputError: If there is none, or it is no name.
    """
    if name is None or not _LICENSE.fullmatch(name):
        given = "is missing" if name is None else f"is {name!r:.200}"
        raise InputError(
            f"--license {given}; expected under which licence others may use the model, such as mit, apache-2.0, "
            "cc-by-4.0 or other (https://huggingface.co/docs/hub/repositories-licenses)"
        )
    return name


def as_code(text: str) -> str:
    """A text as code, in which nothing is obeyed, for a page in Markdown."""
    return "`" + printable(text).replace("`", "'") + "`"
