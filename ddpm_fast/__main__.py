"""`python -m ddpm_fast`: what the commands are."""

import sys

PAGE = """Train denoising diffusion models (DDPM) on your images, and sample from them.

  python -m ddpm_fast.train      train a model on your images
  python -m ddpm_fast.prepare    decode images once, so that training need not
  python -m ddpm_fast.sample     draw images from a model, or edit some with it
  python -m ddpm_fast.average    average the weights of a run otherwise, when it is over
  python -m ddpm_fast.evaluate   measure a model, or compare samplers
  python -m ddpm_fast.plot       draw the theory
  python -m ddpm_fast.convert    keep another library's model as a file of ours
  python -m ddpm_fast.export     write a model for another library, or publish it
  python -m ddpm_fast.info       which backends are active, and why the others are not; or what a model is

Each explains its options with --help. To draw 64 handwritten digits with the model that ships here:

  python -m ddpm_fast.sample --out samples.png
"""

if __name__ == "__main__":
    if unexpected := [argument for argument in sys.argv[1:] if argument != "--help"]:
        sys.exit(f"{PAGE}\nError: {unexpected[0]!a} was not expected here: give a command, as above")
    print(PAGE, end="")
