"""The published 260K model in its four formats: one model, one tokenizer, the published text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file

from steeple.convert import ConvertConfig, convert

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "stories260K"
SOURCES = {
    "v0": ("stories260K.bin", "tok512.bin"),
    "v1": ("checkpoint_v1.bin", "tok512.model"),
    "q80": ("stories260K-q8.bin", "tok512.bin"),
    "gguf": ("stories260Ktok512.gguf", None),
}
transformers.utils.logging.disable_progress_bar()
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/stories260K is not beside the repository"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stories260K")
    for name, (source, tokenizer) in SOURCES.items():
        config = ConvertConfig(
            source=str(STORIES / source),
            out=str(root / name),
            tokenizer=tokenizer and str(STORIES / tokenizer),
            context=512,
        )
        assert convert(config)["parameters"] == 260032
    return {name: root / name for name in SOURCES}


def published() -> str:
    """The greedy text of the model's own page, without the newline that run.c prints after it."""
    page = (STORIES / "stories260K.md").read_text(encoding="utf-8")
    return page.split("-t 0.0\n")[1].split("```")[0].rstrip("\n")


def greedy(folder: Path) -> tuple[str, torch.Tensor]:
    """The text after "" and its ids, the BOS included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("", return_tensors="pt").input_ids.long()
    assert prompt.tolist() == [[1]]
    ids = model.generate(prompt, max_new_tokens=256, do_sample=False)
    return tokenizer.decode(ids[0], skip_special_tokens=True), ids


def test_float_formats_give_the_same_bytes(folders: dict[str, Path]) -> None:
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert len({(folders[name] / file).read_bytes() for name in ("v0", "v1", "gguf")}) == 1, file
    assert (folders["q80"] / "tokenizer.json").read_bytes() == (folders["v0"] / "tokenizer.json").read_bytes()


def test_eight_bits_are_the_float_weights_rounded(folders: dict[str, Path]) -> None:
    exact, found = (load_file(folders[name] / "model.safetensors") for name in ("v0", "q80"))
    assert exact.keys() == found.keys()
    for name, weight in exact.items():
        expected = weight.numpy()
        if weight.dim() == 2:
            groups = expected.reshape(-1, 8)
            scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
            expected = (np.round(groups / scale) * scale).reshape(expected.shape)
        np.testing.assert_array_equal(found[name].numpy(), expected, err_msg=name)


@pytest.mark.parametrize("name", ["v0", "gguf"])
def test_greedy_text_is_the_published_one(folders: dict[str, Path], name: str) -> None:
    assert greedy(folders[name])[0] == published()


def test_eight_bits_leave_the_published_text_only_at_a_near_tie(folders: dict[str, Path]) -> None:
    text, ids = greedy(folders["q80"])
    assert text[:150] == published()[:150]
    exact = transformers.AutoModelForCausalLM.from_pretrained(folders["v0"])
    with torch.no_grad():
        logits = exact(ids[:, :-1]).logits[0]
    first = int((logits.argmax(-1) != ids[0, 1:]).nonzero()[0])
    gaps = -logits.topk(2).values.diff(dim=-1)[:, 0]
    assert gaps[first] < 0.1
    assert gaps.median() > 2.0


def test_all_tokenizers_are_sentencepiece(folders: dict[str, Path]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(STORIES / "tok512.model"))
    stories = (DATA / "text" / "tinystories" / "val.txt").read_text(encoding="utf-8")[:100_000]
    texts = [stories, "", "  two  spaces ", "a\n\n  b\t", "d\u00e9j\u00e0 \u4e16\U0001f642 <0x41>", "1234 don't"]
    for folder in folders.values():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == oracle.encode(text)
            assert tokenizer.decode(ids) == oracle.decode(ids)
