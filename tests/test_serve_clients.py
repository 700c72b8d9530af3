"""Others' programs against the server: the demos, and the long way round lm-eval, llm and LangChain."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from moss_jt.measure.perplexity import EngineTokens, evaluate
from moss_jt.serve.server import Server
from tests.support.models import tiny_model_folder
from tests.support.serving import NAME, shared_moss, shared_server, url

DEMOS = Path(__file__).resolve().parents[1] / "demos"


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def output_of(command: list[str], typed: str = "", **environment: str) -> str:
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_demos_are_answered(server: Server) -> None:
    shown = output_of([sys.executable, "-P", str(DEMOS / "openai_client.py"), url(server)])
    assert shown == "37 times 48 equals 1776[1].\n"
    typed = "What is 37 times 48?\n\n"
    shown = output_of([sys.executable, "-P", str(DEMOS / "http_chat.py"), url(server)], typed)
    assert '[Calculate("37*48")]\n[1776]\n37 times 48 equals 1776[1].\n' in shown


def test_the_curl_lines_are_answered(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    shown = output_of(["sh", str(DEMOS / "curl.sh"), url(server), url(server)]).splitlines()
    first, second = json.loads(shown[0]), json.loads(shown[1])
    assert second["uid"] == first["uid"] and len(second["history"]) == 2
    assert "data: [DONE]" in shown and json.loads(shown[-1])["new_generations"].endswith("<eoc>")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with others' clients, beside ours: they want another numpy."""
    folder = tmp_path_factory.mktemp("others") / "venv"
    venv.create(folder, with_pip=True)
    ours = next(path for path in map(Path, sys.path) if (path / "torch").exists())
    library = next(folder.glob("lib/python*/site-packages"))
    (library / "ours.pth").write_text(str(ours.resolve()))
    packages = ["lm-eval[api]==0.4.13", "llm==0.36", "langchain-openai>=1"]
    output_of([str(folder / "bin" / "pip"), "install", "--quiet", *packages])
    return folder / "bin"


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
address, tokenizer, model, text = sys.argv[1:]
options = dict(tokenizer_backend="huggingface", tokenizer=tokenizer, batch_size=1, num_concurrent=1, max_length=1024)
evaluated = LocalCompletionsAPI(model=model, base_url=f"{address}/v1/completions", **options)
ids = evaluated.tokenizer(text, add_special_tokens=False)["input_ids"]
first = evaluated.tokenizer.decode(ids[:1])
((found, greedy),) = evaluated.loglikelihood([Instance("loglikelihood", {}, (first, text[len(first) :]), 0)])
print(json.dumps([ids, found]))
"""

LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", model=sys.argv[2], temperature=0)
print(chat.invoke([("system", "Be kind."), ("human", "What is 37 times 48?")]).content)
print("".join(piece.content for piece in chat.stream("What is 37 times 48?")))
"""


@pytest.mark.long
def test_lm_eval_finds_what_eval_finds(server: Server, others: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model_folder() / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = "The Moon is an old quiet bright stone. 37 times 48 equals 1776. 你好，我是MOSS。 " * 6
    command = [str(others / "python"), "-c", LM_EVAL, url(server), str(tmp_path), NAME, text]
    ids, logprob = json.loads(output_of(command, OPENAI_API_KEY="none").splitlines()[-1])
    moss = shared_moss()
    assert ids == moss.tokenizer.encode(text)
    assert logprob == pytest.approx(sum(one.logprob for one in moss.logprobs(ids)), abs=1e-6)
    score = evaluate(ids, EngineTokens(moss.engine), None, 1024).model
    assert -logprob / (len(ids) - 1) == pytest.approx(score.nats_per_token, abs=1e-6)


@pytest.mark.long
def test_llm_and_langchain_are_answered(server: Server, others: Path, tmp_path: Path) -> None:
    model = {"model_id": "moss", "model_name": NAME, "api_base": f"{url(server)}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    command = [str(others / "llm"), "-m", "moss", "--key", "none", "What is 37 times 48?"]
    assert "1776" in output_of(command, LLM_USER_PATH=str(tmp_path))
    shown = output_of([str(others / "python"), "-c", LANGCHAIN, url(server), NAME])
    assert shown.count("37 times 48 equals 1776[1].") == 2
