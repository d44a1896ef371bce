"""The command line on a real trained model, run as a user runs it."""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import COMMAND, hasten

from hasten.backends import missing_for_cuda
from hasten.recipe import Recipe

START = "Once upon a time"
GREEDY = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def stories(shared_data):
    return str(shared_data / "stories260K")


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_version_is_the_packages():
    import hasten as package

    assert hasten("--version").good.stdout == f"hasten {package.__version__}\n"


def test_help_names_every_verb():
    text = hasten("--help").good.stdout
    for verb in ("tune", "generate", "chat", "inspect", "bench", "compress", "evaluate"):
        assert f"\n  {verb} " in text


def test_a_mistyped_verb_is_told_the_nearest():
    done = hasten("genrate", "demo")
    assert done.code == 2
    assert "No such command 'genrate'" in done.stderr
    assert "generate" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "-1"), ("--max-tokens", "0"), ("--top-p", "1.5"), ("--min-p", "-0.1"), ("-n", "0"),
        ("--threads", "0"), ("--kv-cache", "int3"), ("--seed", "x"),
    ],
)  # fmt: skip
def test_a_bad_number_names_its_flag(flag, value):
    done = hasten("generate", "demo", "text", flag, value)
    assert done.code == 2
    assert flag in done.stderr
    assert value in done.stderr
    assert "Traceback" not in done.stderr
    *usage, last = done.stderr.strip().splitlines()
    assert usage[0].startswith("Usage: hasten generate")
    assert last.startswith("Error: ")


def test_generate_continues_a_prompt(stories):
    done = hasten("generate", stories, START, "--max-tokens", 32, "--temperature", 0).good
    assert done.stdout.startswith(GREEDY)
    assert done.stdout.endswith("\n")
    assert done.stderr == ""


def test_generate_reads_stdin_without_its_last_newline(stories):
    piped = hasten("generate", stories, "--max-tokens", 16, stdin=START + "\n").good.stdout
    dash = hasten("generate", stories, "-", "--max-tokens", 16, stdin=START).good.stdout
    given = hasten("generate", stories, START, "--max-tokens", 16).good.stdout
    assert piped == dash == given


def test_generate_reads_files_beside_arguments(stories, tmp_path):
    (tmp_path / "a.txt").write_text("Tom had a red ball\n")
    flags = ["--max-tokens", 8, "--json"]
    both = json_lines(hasten("generate", stories, START, "--file", tmp_path / "a.txt", *flags).good.stdout)
    assert [line["prompt"] for line in both] == [START, "Tom had a red ball"]
    alone = json_lines(hasten("generate", stories, "Tom had a red ball", *flags).good.stdout)
    assert both[1]["outputs"] == alone[0]["outputs"]


def test_generate_several_says_which_is_which(stories):
    text = hasten("generate", stories, START, "The cat", "-n", 2, "--max-tokens", 4, "--seed", 1).good.stdout
    heads = [line for line in text.splitlines() if line.startswith("==>")]
    assert heads == [f"==> prompt {p}, continuation {c} <==" for p in (1, 2) for c in (1, 2)]


def test_generate_json_has_logprobs_that_agree(stories):
    flags = ["--max-tokens", 5, "--logprobs", 3, "--json", "--temperature", 0]
    (line,) = json_lines(hasten("generate", stories, START, *flags).good.stdout)
    (output,) = line["outputs"]
    assert output["finish_reason"] == "length"
    assert len(output["token_ids"]) == len(output["logprobs"]) == line["num_output_tokens"] == 5
    assert GREEDY.startswith(output["text"])
    for token in output["logprobs"]:
        assert token["logprob"] <= 0
        assert len(token["top"]) == 3
        assert token["top"][0] == {key: token[key] for key in ("token_id", "token", "logprob")}


def test_a_seed_repeats_whatever_runs_beside_it(stories):
    flags = ["--max-tokens", 24, "--temperature", 0.9, "--seed", 7, "--json"]
    alone = json_lines(hasten("generate", stories, START, *flags).good.stdout)
    beside = json_lines(hasten("generate", stories, "A dog", START, "Lily", *flags).good.stdout)
    assert beside[1]["outputs"] == alone[0]["outputs"]
    other = json_lines(hasten("generate", stories, START, *flags[:-2], 8, "--json").good.stdout)
    assert other[0]["outputs"] != alone[0]["outputs"]


def test_stop_ends_the_answer(stories):
    text = hasten("generate", stories, START, "--stop", "Lily", "--max-tokens", 64).good.stdout
    assert text == ", there was a little girl named \n"


def test_logprobs_without_json_are_refused():
    assert hasten("generate", "demo", "x", "--logprobs", 2).complaint.startswith("--logprobs is shown with --json only")


def test_a_reader_that_leaves_is_no_error(stories):
    flags = ["--max-tokens", "400", "--temperature", "1", "--seed", "3"]
    assert left_by_its_reader("generate", stories, START, *flags, after=1) == (141, "")
    assert left_by_its_reader("generate", stories, START, "-n", "8", *flags, after=0) == (141, "")
    assert left_by_its_reader("--help", after=0) == (141, "")


def left_by_its_reader(*arguments: str, after: int) -> tuple[int, str]:
    """Exit code and stderr of a run whose stdout is closed after so many bytes."""
    writer = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(writer.stdout.read(after)) == after
    writer.stdout.close()
    complaint = writer.stderr.read().decode()
    return writer.wait(60), complaint


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_is_full_is_told_in_a_line(stories, unbuffered):
    for arguments in (["--version"], ["--help"], ["generate", stories, START, "--max-tokens", "4"], ["inspect"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
                timeout=60,
            )
        assert done.stderr.decode().splitlines()[-1] == (
            "hasten: the result cannot be written: No space left on device"
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr.decode()


def test_closed_streams_are_no_error(stories):
    for closing in (">&-", "<&-", "2>&-"):
        command = " ".join([*COMMAND, "generate", stories, "Tom", "--max-tokens", "4", closing])
        done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_while_the_program_is_being_imported_is_quiet(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = hasten("--version", env={"PYTHONPATH": path})
    assert (done.code, done.stderr) == (130, "")


def test_ctrl_c_ends_generate_with_130_and_no_traceback(stories):
    flags = ["--max-tokens", "480", "--json", "-n", "1000", "--temperature", "1"]
    done = interrupted(["generate", stories, START, *flags], after=2)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr.decode()


def interrupted(arguments: list[str], after: float) -> subprocess.CompletedProcess:
    """Run, send SIGINT after so many seconds, and wait."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)
    assert process.poll() is None, process.communicate()[1].decode()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def test_chat_without_a_template_continues_the_text(stories):
    talk = f"{START}\n/help\n/reset\n{START}\n/nonsense\n/quit\nnever read\n"
    done = hasten("chat", stories, "--max-tokens", 20, "--temperature", 0, stdin=talk).good
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert GREEDY.startswith(answers[0])
    assert "no chat template" in done.stderr
    assert "/system TEXT" in done.stderr
    assert "unknown command /nonsense" in done.stderr


def test_chat_remembers_and_says_when_it_grows_too_long(stories):
    flags = ["--max-len", 24, "--temperature", 0]
    done = hasten("chat", stories, *flags, stdin=f"{START}\n{START}\n/reset\n{START}\n").good
    assert done.stderr.count("start again with /reset") == 1
    first, second = done.stdout.splitlines()
    assert first == second


def test_ctrl_c_in_chat_stops_the_answer_and_not_the_program(stories):
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, "chat", stories, "--max-tokens", "480", "--temperature", "1"])
    screen = Screen(terminal)
    screen.wait_for("> ")
    screen.type("Once upon a time\n")
    screen.wait_for("\n")
    screen.wait_for(",")  # the answer has begun: GREEDY's first letter, or one soon after
    screen.type("\x03")
    screen.wait_for("[stopped]")
    screen.wait_for("> ")
    screen.type("/help\n")
    screen.wait_for("forget the conversation")
    screen.wait_for("> ")
    screen.type("\x04")
    screen.wait_for_end()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "Traceback" not in screen.text


class Screen:
    """The far side of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.text, self.seen = descriptor, "", 0

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait_for(self, wanted: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while wanted not in self.text[self.seen :]:
            assert time.monotonic() < deadline, f"{wanted!r} never came; the screen:\n{self.text}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.text += os.read(self.descriptor, 4096).decode(errors="replace")
        self.seen = self.text.index(wanted, self.seen) + len(wanted)

    def wait_for_end(self, seconds: float = 30) -> None:
        """Until the program closes its side."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.descriptor, 4096).decode(errors="replace")
                except OSError:  # what Linux says when the other side is closed
                    return
        raise AssertionError(f"the program did not end; the screen:\n{self.text}")


def test_inspect_tells_the_machine_the_model_and_what_to_expect(stories):
    data = json.loads(hasten("inspect", stories, "--device", "cpu", "--json").good.stdout)
    assert data["device"] == "cpu"
    assert data["model"]["family"] == "llama"
    assert data["model"]["parameters"] == 260032 - (2 * 5 + 1) * 64
    assert data["machine"]["isa"]
    assert data["machine"]["cores"] == len(os.sched_getaffinity(0))
    stored, int8 = data["predictions"]["as stored"], data["predictions"]["int8"]
    assert int8["weight_bytes"] < stored["weight_bytes"]
    assert int8["decode"]["1"] > stored["decode"]["1"] > 0
    assert data["conditions"]["kv_cache"] == "fp32"
    text = hasten("inspect", stories, "--device", "cpu").good.stdout
    assert "processor" in text
    assert "as stored" in text
    assert "260" in text


def test_inspect_without_a_model_tells_the_machine():
    forced = hasten("inspect", "--device", "cpu", "--json", env={"HASTEN_ISA": "portable"}).good
    assert json.loads(forced.stdout)["machine"]["isa"] == "portable"


@pytest.mark.parametrize("verb", ["bench", "inspect"])
def test_a_gpu_that_is_not_there_is_one_line(verb, stories):
    if missing_for_cuda() is None:
        pytest.skip("there is a GPU")
    assert "device cuda cannot be used" in hasten(verb, stories, "--device", "cuda").complaint


def test_bench_reports_speed_and_its_conditions(stories):
    flags = ["--device", "cpu", "--prefill", 64, "--decode", 16, "--batch", 1, "--batch", 3, "--rounds", 2]
    data = json.loads(hasten("bench", stories, *flags, "--json").good.stdout)
    assert [row["streams"] for row in data["results"]] == [1, 1, 3]
    for row in data["results"]:
        assert 0 < row["speed"]["low"] <= row["speed"]["median"] <= row["speed"]["high"]
    assert data["results"][0]["ttft"]["median"] > 0
    assert data["results"][1]["of_bandwidth"] > 0  # above 1 for a model that stays in cache
    assert data["peak_memory"] > 1 << 20
    assert data["conditions"]["threads"] >= 1
    assert data["notes"] == []
    assert not any("energy" in row for row in data["results"])
    table = hasten("bench", stories, *flags).good.stdout
    assert "decode 16, 3 streams" in table


def test_bench_says_how_many_threads_it_used(stories, tmp_path):
    quick = ["--device", "cpu", "--prefill", 8, "--decode", 2, "--batch", 1, "--rounds", 1, "--json"]
    data = json.loads(hasten("bench", stories, *quick, env={"HASTEN_THREADS": "1"}).good.stdout)
    assert data["conditions"]["threads"] == 1
    folder = with_settings(stories, tmp_path, threads=3)
    data = json.loads(hasten("bench", folder, *quick).good.stdout)
    assert data["conditions"]["threads"] == 3
    data = json.loads(hasten("bench", folder, *quick, "--threads", 2).good.stdout)
    assert data["conditions"]["threads"] == 2


def with_settings(model: str, parent: Path, **run: object) -> Path:
    """A copy of the model whose config.json says so of how it is run."""
    folder = parent / "stated"
    shutil.copytree(model, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hasten": {"run": run}}))
    return folder


def test_inspect_predicts_with_the_kv_cache_of_the_folder(stories, tmp_path):
    def kv_cache(*arguments: object) -> str:
        return json.loads(hasten("inspect", *arguments, "--device", "cpu", "--json").good.stdout)["conditions"][
            "kv_cache"
        ]

    assert kv_cache(stories, "--kv-cache", "bf16") == "bf16"
    assert kv_cache(with_settings(stories, tmp_path, kv_cache="int8")) == "int8"
    assert "kv_cache is fp8, expected" in hasten("inspect", stories, "--kv-cache", "fp8", "--device", "cpu").complaint


def test_bench_that_does_not_fit_says_what_does(stories):
    complaint = hasten("bench", stories, "--prefill", 4096).complaint
    assert "--prefill 511" in complaint


@pytest.fixture(scope="module")
def int8(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "int8"
    done = hasten("compress", stories, "int8", "-o", out).good
    assert str(out) in done.stdout
    return out


def test_compress_writes_a_folder_that_runs_and_says_what_was_done(stories, int8):
    assert {"config.json", "model.safetensors", "recipe.yaml", "receipt.json"} <= {path.name for path in int8.iterdir()}
    text = hasten("generate", int8, START, "--max-tokens", 16).good.stdout
    assert GREEDY.startswith(text.strip("\n")[:30])
    again = int8.with_name("again")
    assert hasten("compress", stories, int8 / "recipe.yaml", "-o", again).good.stdout
    assert (again / "model.safetensors").read_bytes() == (int8 / "model.safetensors").read_bytes()


def test_a_preset_is_shown_as_a_file_that_can_be_changed(stories, tmp_path):
    shown = hasten("compress", "--show", "int4-g64").good
    assert shown.stderr == ""
    assert Recipe.from_yaml(shown.stdout) == Recipe.load("int4-g64")
    changed = tmp_path / "mine.yaml"
    changed.write_text(shown.stdout.replace("format: int4\n", "format: int4\n    fallback: int8\n"))
    assert "int8" in hasten("compress", stories, changed, cwd=tmp_path).good.stderr
    assert "did you mean 'int4-g64'?" in hasten("compress", "--show", "int4-g6").complaint


def test_the_usual_folder_has_the_resolved_models_name(stories, tmp_path):
    here = tmp_path / "my-model"
    shutil.copytree(stories, here)
    assert (here / "config.json").is_file()
    os.chmod(here, 0o755)
    assert "my-model-int8" in hasten("compress", ".", "int8", cwd=here).good.stdout
    assert (here / "my-model-int8" / "recipe.yaml").is_file()
    assert hasten("compress", "../my-model", "./my-model-int8", cwd=here).good
    assert (here / "my-model-my-model-int8" / "recipe.yaml").is_file()
    complaint = hasten("tune", ".", "-o", "my-model-int8", cwd=here).complaint
    assert "my-model-int8 exists already" in complaint
    (here / "my-model-tuned").mkdir()
    assert "my-model-tuned exists already" in hasten("tune", ".", cwd=here).complaint


def test_evaluate_measures_against_the_original(stories, int8, tmp_path):
    (tmp_path / "text.txt").write_text(hasten("generate", stories, START, "--max-tokens", 480).good.stdout * 4)
    flags = ["--against", stories, "--data", tmp_path / "text.txt", "--window", 64]
    quality = json.loads(hasten("evaluate", int8, *flags, "--json").good.stdout)["quality"]
    assert 0.9 < quality["top1_agreement"]["median"] <= 1
    assert abs(quality["loss"]["median"]) < 0.01
    assert quality["loss"]["low"] < quality["loss"]["median"] < quality["loss"]["high"]
    words = hasten("evaluate", int8, *flags).good.stdout
    assert [line.split("  ")[0] for line in words.splitlines()] == [
        *("text", "bits per byte", "perplexity", "loss", "divergence", "agreement", "flips", "right to wrong"),
        "wrong to right",
    ]


def test_max_loss_is_a_share():
    from hasten.cli.tune import parse_share

    assert parse_share("1%") == parse_share("0.01") == 0.01
    for wrong in ("-1%", "100%", "lots", "nan", ""):
        assert "--max-loss" in hasten("tune", "demo", "--max-loss", wrong).complaint


def test_debug_shows_where_an_error_came_from(tmp_path):
    done = hasten("generate", tmp_path, "x", env={"HASTEN_DEBUG": "1"})
    assert done.code == 1
    assert "Traceback" in done.stderr


def test_too_little_memory_is_said_in_a_line():
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (230 << 20, 230 << 20))  # less than what bandwidth is measured on

    done = hasten("inspect", env={"OPENBLAS_NUM_THREADS": "1"}, preexec_fn=limit)
    assert done.complaint.startswith("not enough memory")


def test_an_encoding_without_the_letters_gets_question_marks(stories):
    flags = ["caf\u00e9", "--max-tokens", 1, "--json"]
    done = hasten("generate", stories, *flags, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}).good
    assert json.loads(done.stdout)["prompt"] == "caf?"


def test_colours_only_where_wanted(stories):
    piped = hasten("inspect", stories, env={"FORCE_COLOR": "", "TERM": "xterm"}).good.stdout
    assert "\x1b[" not in piped
