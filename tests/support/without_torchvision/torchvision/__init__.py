"""Stands in for torchvision where the one that can be installed was built for another torch.

denoising-diffusion-pytorch imports it at its top, and uses it in its Trainer alone. To test against its networks, put
this folder's parent on PYTHONPATH.
"""
