"""On a pretend accelerator `full` costs what the model alone costs, and a model over two of them is served."""

from __future__ import annotations

import torch
import zoo
from pretend import PretendDevice
from transformers import DynamicCache

from chunkcache.blend import Decoder, Full, Plan, SelectivePrefill, self_check


def test_full_has_the_launches_of_the_model_alone():
    with PretendDevice() as device, torch.no_grad():
        model = zoo.new("llama", num_hidden_layers=32).to("cuda:0")
        decoder = Decoder(model)
        self_check(decoder)
        ids = tuple(range(4, 104))
        input_ids = torch.tensor([ids], device="cuda:0")
        with device.watch() as alone:
            model(input_ids, past_key_values=DynamicCache(), logits_to_keep=1)
        with device.watch() as ours:
            SelectivePrefill(decoder, Plan(ids), Full()).run()
        assert ours.launches == alone.launches
        assert not device.total.violations
