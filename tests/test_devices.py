"""A GPU, played: on a machine without one, under FakeTensorMode.

Fake tensors have shapes and devices, but no numbers. So mixing devices raises, and so does every
read by the host (`.item()`, `if tensor:`), which on a GPU would make it wait in every step. What
this cannot see: backward, autocast, devices mixed in a `torch._foreach_` call, and copies from
pageable memory (`torch.tensor(list, device=...)`), which make the host wait as well.
"""

import os

import all_recipes
import pytest
import torch
from conftest import TOY
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import pseudo_labels
import train
from data import Batches, draw
from extras import finetune, segment, tuning
from mae import VisionTransformer
from pseudo_labels import BALANCING, Student
from support import datasets, devices, report, settings
from support.command_line import UsageError
from support.datasets import Images
from support.health import count_labels
from teachers import make_teachers

GPU = torch.device("cuda", 0)
# deepcopy asks fake tensors for their place in memory, which they do not have
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class PlayedGPU(FakeTensorMode):
    def __deepcopy__(self, memo):                          # teachers are deep copies of the student
        return self


def step_on_a_played_gpu(*flags):
    """Augmentation, both teachers, student, losses, counts of labels and the EMA: one step."""
    config = settings.resolve(["--img-size", "16", "--patch-size", "4", "--batch-size", "4",
                               "--image-clusters", "4", "--patch-clusters", "7", *flags])
    arch = settings.architecture(config, 3) | TOY
    if config.target == "tokens":
        arch["target_dim"] = TOY["embed_dim"]
    with PlayedGPU():
        pixels = torch.zeros(4, 3, 20, 24, dtype=torch.uint8, device=GPU)
        images = Images(torch.zeros(4), [], (16, 16), 3, pixels)
        batches = Batches(images, torch.zeros(4), [0.5] * 3, [0.2] * 3, seed=0, batch=4, patches=16,
                          views=config.views, smallest=config.crop,
                          colours=config.colours, teacher_view=config.teacher_view, device=GPU)
        numbers = {name: values.to(GPU)
                   for name, values in draw(0, 0, 4, config.views, 16).items()}
        views = batches.augment(numbers, pixels[:, None])
        with GPU:                          # not by `train.build`: fake modules do not move by .to()
            student = Student(**arch)
        teachers = make_teachers(student, config)
        loss, terms, labels, targets = train.training_step(student, teachers, views, config)
        meter = report.Meter(0)
        meter.add(loss, terms, labels, 1)
        teachers.follow(student, {"labelling": 0.9, "reconstruction": 0.99})
    everything = [loss, *terms.values(), *labels.values(), *targets.values(), *meter.sums.values(),
                  *meter.counts.values()]
    assert all(x.device == GPU for x in everything) and everything
    for teacher in teachers.named().values():
        assert all(x.device == GPU for x in teacher.state_dict().values())
    return labels


@pytest.mark.parametrize("balancing", BALANCING)
@pytest.mark.parametrize("name", settings.RECIPES)
def test_no_device_is_mixed_and_no_value_is_read(name, balancing):
    step_on_a_played_gpu("--recipe", name, "--balancing", balancing)


@pytest.mark.parametrize("name", [n for n in all_recipes.VARIANTS if n not in settings.RECIPES])
def test_nor_in_any_other_variant(name):
    step_on_a_played_gpu(*all_recipes.VARIANTS[name])


def test_nor_where_it_is_trained_further():
    """Forward and loss of extras/: classes of images, classes of pixels. (Mask R-CNN reads values,
    as the number of boxes depends on them.)"""
    with PlayedGPU(), GPU:
        imgs = torch.zeros(2, 3, 16, 16)
        for token in ("class", "mean"):
            model = finetune.Classifier(VisionTransformer(16, 4, 3, 32, 4, 2), 5, token)
            tuning.drop_paths(model.encoder, 0.2)
            scores = model.train()(imgs)
            assert scores.shape == (2, 5) and scores.device == GPU
        model = segment.Segmenter(VisionTransformer(16, 4, 3, 32, 4, 2), 5)
        scores = model(imgs)
        loss = segment.pixel_loss(scores, torch.zeros(2, 16, 16, dtype=torch.long))
        assert scores.shape == (2, 5, 16, 16) and loss.device == GPU


def test_the_played_gpu_has_teeth(monkeypatch):
    """It finds a value that is read, and a tensor that is on the CPU."""
    def reads_a_value(labels):
        assert labels.sum().item() > 0
        return count_labels(labels)

    with monkeypatch.context() as patch:
        patch.setattr(report, "count_labels", reads_a_value)
        with pytest.raises(DataDependentOutputException):
            step_on_a_played_gpu()

    def mixes_devices(labels, views):
        return labels + torch.zeros(labels.shape)

    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "swap_views", mixes_devices)
        with pytest.raises(RuntimeError, match="device"):
            step_on_a_played_gpu()


# -------------------------------------------------------------------------- which device is chosen

@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, the current one number `current`; perhaps under torchrun."""
    def make(gpus=0, current=0, local_rank=None, processes=1, mps=False):
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kwargs: zeros(
            *size, **kwargs) if torch.device(device).type == "mps" and mps else zeros(
            *size, device=device, **kwargs))
        for name, value in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", processes),
                            ("RANK", local_rank), ("WORLD_SIZE", processes),
                            ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 29500)):
            if local_rank is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        return chosen
    return make


@pytest.mark.parametrize("name, there, want", [
    ("auto", dict(gpus=1), "cuda:0"),
    ("cuda", dict(gpus=1), "cuda:0"),
    ("auto", dict(gpus=4, current=2), "cuda:2"),
    ("cuda:1", dict(gpus=2), "cuda:1"),
    ("auto", dict(gpus=4, local_rank=3, processes=4), "cuda:3"),
    ("cuda", dict(gpus=4, local_rank=0, processes=4), "cuda:0"),
    ("auto", dict(mps=True), "mps"),
    ("mps", dict(mps=True), "mps"),
    ("auto", dict(gpus=1, mps=True), "cuda:0"),
    ("auto", dict(), "cpu"),
    ("cpu", dict(gpus=2), "cpu"),
    ("cpu", dict(gpus=2, local_rank=1, processes=2), "cpu"),
])
def test_the_right_device_is_chosen(machine, name, there, want):
    made_current = machine(**there)
    device = devices.choose_device(name)
    assert str(device) == want
    assert made_current == ([device] if device.type == "cuda" else [])
    assert device.type != "cuda" or device.index is not None     # `torch.cuda.set_device` needs it


@pytest.mark.parametrize("name, there, words", [
    ("cuda", dict(), "--device cuda: no GPU"),
    ("cuda:2", dict(gpus=2), "there are 2 GPUs"),
    ("cuda:1", dict(gpus=2, local_rank=0, processes=2), "use --device cuda"),
    ("cuda", dict(gpus=2, local_rank=0, processes=3), "--nproc-per-node: use 2 or fewer"),
    ("abacus", dict(), "--device abacus"),
    ("meta", dict(), "--device meta"),
])
def test_a_device_that_is_not_there_is_refused(machine, name, there, words):
    machine(**there)
    with pytest.raises(UsageError, match=words):
        devices.choose_device(name)


def test_the_device_is_chosen_before_processes_meet_and_tensors_are_made(monkeypatch):
    """Otherwise each process of a torchrun would first take memory of the first GPU."""
    order = []

    def choose(name):
        order.append("device")
        return torch.device("cpu")

    def start(device):
        order.append("processes")
        return 0, 1

    def make(*args):
        order.append("tensors")
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "choose_device", choose)
    monkeypatch.setattr(devices, "start_processes", start)
    for where, name in ((datasets, "load_images"), (datasets, "mean_std"), (train, "build")):
        monkeypatch.setattr(where, name, make)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--recipe", "mae"])
    assert order == ["device", "processes", "tensors"]


def test_each_process_binds_its_gpu_and_mps_has_one_process(monkeypatch):
    met = []
    def meet(backend, device_id, **store):
        met.append((backend, device_id))
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(torch.distributed, "rendezvous",
                        lambda *args, **kwargs: iter([(torch.distributed.HashStore(), 3, 4)]))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert devices.start_processes(torch.device("cuda", 1)) == (3, 4)
    assert devices.start_processes(torch.device("cpu")) == (3, 4)
    assert met == [("nccl", torch.device("cuda", 1)), ("gloo", None)]
    with pytest.raises(UsageError, match="without torchrun"):
        devices.start_processes(torch.device("mps"))


@pytest.mark.parametrize("device, gpu_has_bf16, cpu_is_faster, want", [
    ("cuda:0", True, False, "bf16"),                       # A100, RTX 3090, ...
    ("cuda:0", False, True, "fp16"),                       # T4, V100
    ("cpu", False, True, "bf16"),
    ("cpu", True, False, "fp32"),
    ("mps", True, True, "fp32"),
])
def test_the_fastest_precision_is_chosen(monkeypatch, device, gpu_has_bf16, cpu_is_faster, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bf16)
    monkeypatch.setattr(devices, "faster_in_bf16", lambda: cpu_is_faster)
    high = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", high.append)
    device = torch.device(device)
    assert devices.best_precision(device) == want
    assert devices.choose_precision("auto", device) == devices.choose_precision(want, device)
    assert high == ["high", "high"] * (device.type == "cuda")          # TF32


def test_a_processor_is_timed(monkeypatch):
    """A product of bf16 that takes three times as long, or a third, decides."""
    monkeypatch.undo()                                     # what conftest.py replaces
    clock = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    for seconds, want in ((3e-3, False), (1e-3, False), (0.3e-3, True)):
        def product(a, b):                                 # sometimes other work comes between
            busy = 1 if int(1e6 * clock[0]) % 3 else 10
            clock[0] += busy * (seconds if a.dtype == torch.bfloat16 else 1e-3)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", product)
            assert devices.faster_in_bf16() == want


def test_fp64_is_refused_on_mps():
    with pytest.raises(UsageError, match="--precision fp64"):
        devices.choose_precision("fp64", torch.device("mps"))


def test_the_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert devices.cores() == 12
    for processes, cores in (("1", 12), ("8", 1), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert devices.cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert devices.cores() == 16
