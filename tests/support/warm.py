"""Import this in a process from which others are forked, see together.py: whatever they would import anew."""

import torch

from ddpm_fast.commands import train

torch.set_num_threads(1)  # threads would not survive the fork
_parameter = torch.nn.Parameter(torch.zeros(1))
_parameter.sum().backward()
torch.optim.AdamW([_parameter], fused=True).step()  # the first one imports torch's compiler, which takes seconds
app = train.app
