#!/usr/bin/env python3
"""Make `golden.json`: what transformers, in float32, answers with the demo model.

    pip install torch transformers
    python tests/golden/smollm2/make_smollm2.py MODEL_DIR      # made by launch/make_demo_model.py

For each prompt: its text or chat messages, its ids, 64 greedy ids, their log-probabilities
(log-softmax of the logits), and how far each winner was ahead of the runner-up in logits. Where a
continuation ends early, its last id is the end token. `close_calls` lists the steps where the two
best logits are nearer than CLOSE: rounding alone could turn those.

The tokenizer is read with `PreTrainedTokenizerFast`, which takes tokenizer.json as it stands;
`AutoTokenizer` puts Qwen's own word splitting in place of SmolLM2's, going by the model type.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

MAX_TOKENS = 64
CLOSE = 1e-3

PASSAGE = (
    "The lighthouse on the northern cape had been kept by the same family for four generations. "
    "Every evening, an hour before sunset, somebody climbed the one hundred and eighty-two steps, "
    "trimmed the wick, polished the great lens with a linen cloth, and wrote a line in the log: the "
    "wind, the state of the sea, the ships in sight. Nobody had ever asked them to keep the log, and "
    "nobody had ever read it. It filled forty-one volumes on a shelf beside the stove.\n\n"
    "In the winter of 1953 a young engineer came from the capital with a letter. The lamp was to be "
    "made electric, the letter said, and would from then on look after itself. He stayed for three "
    "weeks, sleeping in the room under the lantern, drawing cables through the old walls. In the "
    "evenings, because there was nothing else to do, he began to read the log. He read about the "
    "storm of 1889, when the sea came over the rocks and took the boathouse; about the whale that "
    "slept in the bay for a whole summer; about a sailing ship without a crew that passed the cape "
    "three times in one night and was never seen again. He noticed that the writers never spoke of "
    "themselves, not even once, and yet after a while he could tell each of them by what they chose "
    "to notice.\n\n"
    "On his last evening the engineer climbed the steps with the keeper, who was then an old woman. "
    "The new lamp was ready. She looked at it for a long time, and then she turned to him and said:"
)



def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


PROMPTS = {
    "capital": question("What is the capital of France?"),  # the one that ends before 64 tokens
    "chat": question("Why is the sky blue, and why is it red in the evening?"),
    "english": "The three most important inventions of the nineteenth century were",
    "code": "def fibonacci(n: int) -> int:\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "chinese": "中国的首都是北京。法国的首都是",
    "numbers": "1, 2, 4, 8, 16, 32, 64, 128,",
    "passage": PASSAGE,
    "emoji": "🎉🎂 Happy birthday! 🥳 I wish you",
    "word": "Gravity",
}


def encode(tokenizer, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def answer(model, tokenizer, prompt: str | list[dict]) -> dict:
    prompt_ids = encode(tokenizer, prompt)
    ids = torch.tensor([prompt_ids])
    sequence = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
    )
    tokens = sequence[0, len(prompt_ids) :]
    logits = model(sequence).logits[0, len(prompt_ids) - 1 : -1]
    best = logits.topk(2)
    assert torch.equal(best.indices[:, 0], tokens), "generate and forward disagree"
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
    return {
        "prompt": prompt,
        "prompt_token_ids": prompt_ids,
        "token_ids": tokens.tolist(),
        "text": tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "logprobs": [round(value, 6) for value in logprobs],
        "gaps": [round(value, 6) for value in gaps],
        "close_calls": [step for step, gap in enumerate(gaps) if gap < CLOSE],
    }


def compact(value: dict) -> str:
    """JSON with one line for each field of each prompt, so that differences can be read."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items() if k != "prompts"]
    blocks = []
    for name, record in value["prompts"].items():
        fields = [f"      {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items()]
        blocks.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n    }")
    lines.append('  "prompts": {\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden answers of the demo model.")
    parser.add_argument("model", type=Path, help="the demo model's directory")
    folder = parser.parse_args().model
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    golden = {
        "made_by": f"torch {torch.__version__}, transformers {transformers.__version__}, float32, eager",
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "prompts": {name: answer(model, tokenizer, prompt) for name, prompt in PROMPTS.items()},
    }
    for name, record in golden["prompts"].items():
        print(
            f"{name}: {len(record['prompt_token_ids'])} + {len(record['token_ids'])} tokens, "
            f"smallest gap {min(record['gaps']):.4f}, close calls {record['close_calls']}"
        )
    path = Path(__file__).with_name("golden.json")
    path.write_text(compact(golden), encoding="utf-8")


if __name__ == "__main__":
    main()
