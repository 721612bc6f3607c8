"""Two processes of the example: the second one restores what the first one saved,
and answers the same. llama_server_loop_test.py PROGRAM MODEL BACKENDS PROSE SOCKET"""

import json
import pathlib
import subprocess
import sys

program, model, backends, prose, address = sys.argv[1:]
text = pathlib.Path(prose).read_text()
CHUNK = 256
# Two slots; the same one twice.
requests = [
    {"slot": 0, "prompt": text[:1500], "max_tokens": 6},
    {"slot": 1, "prompt": text[3000:3400], "max_tokens": 6},
    {"slot": 0, "prompt": "Once upon a time, there was a", "max_tokens": 6},
]


def run(socket: str, lines: list[dict]) -> list[dict]:
    done = subprocess.run(
        [program, model, backends, socket, "2", "1"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        check=True, stdout=subprocess.PIPE, text=True, timeout=600,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), done.stdout
    assert not any("problem" in answer for answer in answers), answers
    return answers


first = run(address, requests)
second = run(address, requests)
alone = run("/nobody/here", requests[:1])
for one, other in zip(first, second):
    print(one["prompt_tokens"], "tokens: restored", other["restored"], one["text"])
    assert one["restored"] == 0
    assert one["saved"] == one["prompt_tokens"] + len(one["tokens"])
    assert other["restored"] == other["prompt_tokens"] - 1
    assert other["tokens"] == one["tokens"] and len(one["tokens"]) > 0
assert first[0]["prompt_tokens"] > CHUNK
assert alone[0]["tokens"] == first[0]["tokens"] and "saved" not in alone[0]

# The next turn of a conversation begins with prompt and answer.
turn = dict(requests[0], prompt=requests[0]["prompt"] + first[0]["text"] + "\n\nThen")
(next_turn,) = run(address, [turn])
assert next_turn["restored"] >= first[0]["prompt_tokens"] - 1, next_turn

# What is no request is answered, too.
bad = run(address, [{"slot": 7, "prompt": "x"}, {"slot": 0, "prompt": ""}])
assert all("error" in answer for answer in bad)
