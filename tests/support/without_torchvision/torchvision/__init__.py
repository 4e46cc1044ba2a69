"""Stands in for torchvision where the one that can be installed was built for another torch.

denoising-diffusion-pytorch imports it at its top, and uses it in its Trainer alone; torch-fidelity for its own data
sets and networks. To test against their networks and formulas, put this folder's parent on PYTHONPATH.
"""
