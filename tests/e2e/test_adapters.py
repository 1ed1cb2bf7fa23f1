"""LoRA adapters over MQTT: named behind the model, kept apart, and refused when nobody knows them."""

import pytest

from protocol.client import Client
from protocol.errors import RequestError
from protocol.request import Request
from tests.faults.service import ServiceProcess
from tests.workers.adapters import adapt
from tests.workers.models import servable, tiny

# PEFT asks transformers for something that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


async def test_adapters_and_the_base_are_served_side_by_side(tmp_path, broker):
    model = servable(tmp_path / "model")
    names = ("formal", "brief")
    for seed, name in enumerate(names):
        adapt(tiny("llama"), tmp_path / name, seed, r=8, lora_alpha=32, target_modules=["q_proj", "up_proj"])
    service = ServiceProcess(tmp_path, model, broker.url)
    service.config.write_text("[model.adapters]\n" + "".join(f'{name} = "{tmp_path / name}"\n' for name in names))

    def request(name: str) -> Request:
        prompt = list(range(5, 60))
        return Request(model=name, prompt=prompt, max_tokens=30, temperature=0.0, ignore_eos=True, stream=True)

    async with service, Client(broker.url, tenant="alice") as client:
        results = {
            name: await client.complete(request(name), model="tiny") for name in ("tiny", "tiny:formal", "tiny:brief")
        }
        again = await client.complete(request("tiny:brief"), model="tiny")
        with pytest.raises(RequestError, match="no adapter 'none'") as caught:
            await client.complete(request("tiny:none"), model="tiny")
        await service.settled()
    assert caught.value.code == "model_not_found"
    assert {name: result.data.model for name, result in results.items()} == {name: name for name in results}
    assert len({result.text for result in results.values()}) == 3
    assert [result.usage.prompt_tokens_details.cached_tokens for result in results.values()] == [0, 0, 0], (
        "what one has computed is of no use to another"
    )
    assert again.text == results["tiny:brief"].text
    assert again.usage.prompt_tokens_details.cached_tokens > 0
