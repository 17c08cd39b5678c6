"""The peer of the benchmarks: rounds as a usual Flower app runs them, with training replaced by a constant update.

The server averages with Flower's own FedAvg. The client does for each message what apps for language models do: it
loads the base model, attaches a LoRA adapter, sets its weights to what it received, trains, here by adding a constant,
and replies with the adapter's weights. Ray, its
actors and what they keep between messages are as Flower sets them up; so libraries are imported once per actor.
"""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from confide.client.postbox import private_folder
from confide.common.canonical import canonical_bytes
from confide.common.errors import RunError
from confide.simulations.flower import ERRAND, FlowerJob, errand, errand_in, under_flower

UPDATE = 1e-4  # what a round adds to every parameter

_GLANCE_S = 0.2
_SETTINGS, _TICKS = "peer.json", "ticks.json"

server = ServerApp()
client = ClientApp()


def reload_rounds(model: Path, sites: int, rounds: int) -> list[float]:
    """Return the seconds of each round, from the end of the one before; the first, in which Ray starts, is left out.

    What travels is a LoRA adapter of rank 32 with its head: for the demo's model 296,067 parameters.

    Args:
        model: The base model's directory.
        sites: How many clients take part in every round.
        rounds: How many rounds are timed.

    Raises:
        RunError: Flower failed, or a client did.
    """
    settings = {"model": str(model.resolve()), "sites": sites, "rounds": rounds + 1}
    job = FlowerJob(
        server_app="confide.simulations.flower_peer:server",
        client_app="confide.simulations.flower_peer:client",
        sites=sites,
        environment={"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    with private_folder() as folder:
        ticks, log = errand_in(folder) / _TICKS, folder / "flower.log"
        (ticks.parent / _SETTINGS).write_bytes(canonical_bytes(settings))
        with under_flower(job, folder, log) as flower:
            while not ticks.exists():
                if not flower.running() and not ticks.exists():
                    raise RunError(
                        f"Flower ended the peer's run: {flower.reason()}. It said: {log.read_text()[-2000:]}"
                    )
                time.sleep(_GLANCE_S)
        ends: list[float] = json.loads(ticks.read_bytes())
    return [after - before for before, after in itertools.pairwise(ends)]


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds by Flower's FedAvg and write down when each ended."""
    with errand() as folder:
        settings = _settings(folder)
        sites, rounds = settings["sites"], settings["rounds"]
        ends: dict[int, float] = {}

        def note_end(number: int, _: ArrayRecord) -> None:
            ends[number] = time.monotonic()

        strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites, train_metrics_aggr_fn=_count
        )
        start = _weights(_load(settings["model"]))
        before = start.to_numpy_ndarrays()
        result = strategy.start(grid, start, num_rounds=rounds, evaluate_fn=note_end)
        counts = [metrics["clients"] for metrics in result.train_metrics_clientapp.values()]
        moved = zip(result.arrays.to_numpy_ndarrays(), before, strict=True)
        if counts != [sites] * rounds or not all(np.allclose(a, b + rounds * UPDATE, atol=1e-5) for a, b in moved):
            raise RunError(f"Of {sites} clients there took part in each of {rounds} rounds: {counts}.")
        draft = folder / f"{_TICKS}.part"
        draft.write_text(json.dumps([ends[number] for number in range(1, rounds + 1)]))
        draft.replace(folder / _TICKS)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Load the base model, attach LoRA, take the weights received, add a constant and reply with the weights."""
    import torch
    from peft import set_peft_model_state_dict

    model = _load(_settings(Path(os.environ[ERRAND]))["model"])
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(UPDATE)
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": _weights(model), "metrics": metrics}), reply_to=message)


def _weights(model: Any) -> ArrayRecord:  # noqa: ANN401  peft ships no types
    """Return what travels: the adapter's and the head's weights."""
    from peft import get_peft_model_state_dict

    return ArrayRecord(get_peft_model_state_dict(model))


def _load(directory: str) -> Any:  # noqa: ANN401  peft ships no types
    """Return the model a usual app trains; at rank 32 the demo model's adapter has 296,067 parameters."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
    return get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=32, lora_alpha=64))


def _count(replies: list[RecordDict], weight: str) -> MetricRecord:
    """Return how many clients took part; FedAvg goes on without those that failed."""
    return MetricRecord({"clients": len(replies)})


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_bytes())
    return settings
