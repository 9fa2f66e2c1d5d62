"""The gradient of each image by itself, with torch.func: for differential privacy, influence, gradient noise.

python per_sample_gradients.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

import lenet_ext


def main() -> None:
    torch.manual_seed(0)
    net = lenet_ext.Net()
    images, labels = torch.randn(16, 1, 32, 32), torch.randint(10, (16,))
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        scores = functional_call(net, parameters, (image.unsqueeze(0),))
        return F.cross_entropy(scores, label.unsqueeze(0))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)

    # Their mean is the gradient that everybody knows.
    F.cross_entropy(net(images), labels).backward()
    for name, value in net.named_parameters():
        torch.testing.assert_close(gradients[name].mean(0), value.grad, rtol=1e-4, atol=1e-6)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    print(f"norms of the gradients of 16 images: {norms.min():.2f} to {norms.max():.2f}")


if __name__ == "__main__":
    main()
