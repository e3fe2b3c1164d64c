"""One typed config: what composes, what is refused and how, what a run is as a file, and what names are found."""

import inspect
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.app import job_names, run_app
from conf.completion import BASH, candidates
from conf.compose import compose, load_run, to_yaml
from conf.identity import differences, flatten, plain, scientific
from conf.keys import leaf_types, names
from conf.options import ADAMW
from conf.registry import Registry, load_plugins
from conf.schema import Precision, Run, Stage

pytestmark = pytest.mark.unit

HERE = Path(__file__).parent
GROUPS = names().groups
NEEDED = {"corpus": ["corpus.path=x"], "tokenizer": ["tokenizer.path=x"]}


def refused(*overrides: str, config_dir: str | None = None) -> list[str]:
    """The lines of the error that these overrides give."""
    with pytest.raises(ValueError, match=r".") as caught:
        compose(list(overrides), config_dir)
    lines = str(caught.value).splitlines()
    assert 1 <= len(lines) <= 3, lines
    assert "Traceback" not in str(caught.value)
    return lines


# --- what composes


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options])
def test_every_option_composes_and_reads_back(group: str, option: str, tmp_path: Path) -> None:
    run = compose([f"{group}={option}", *NEEDED.get(group, [])])
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert load_run(str(tmp_path / "run.yaml")) == run
    if group == "experiment":
        assert run.run.name == option


def test_the_committed_quickstart_is_what_composes() -> None:
    committed = (HERE / "quickstart.yaml").read_text()
    assert committed == to_yaml(compose(["experiment=quickstart"])), (
        "a default of quickstart changed; if that is meant, regenerate the file and commit it:\n"
        "python -m conf.compose experiment=quickstart > tests/quickstart.yaml"
    )


def test_quickstart_is_the_run_it_promises() -> None:
    run = compose(["experiment=quickstart"])
    assert (run.run.name, run.cluster.ranks, run.zero.stage, run.tokenizer.vocab_size) == ("quickstart", 2, 1, 4096)
    assert run.stages == list(Stage)
    assert run.corpus.reader == "python_stdlib"
    assert set(run.data.filters) == {"min_chars", "max_chars"}


def test_the_order_of_precedence_is_group_experiment_command_line() -> None:
    assert compose(["experiment=quickstart"]).optim.lr == 3e-3
    assert compose(["optim.lr=1e-4", "experiment=quickstart"]).optim.lr == 1e-4
    assert compose(["experiment=quickstart", "model=nano"]).model.width == 64
    assert compose(["experiment=quickstart", "experiment=null"]).run.name == "default"
    assert compose(["experiment=quickstart", "~experiment"]).run.name == "default"


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_before_a_known_name_means_the_name(plus: str) -> None:
    run = compose([f"{plus}train.steps=7", f"{plus}model=nano", f"{plus}experiment=quickstart"])
    assert (run.train.steps, run.model.width, run.run.name) == (7, 64, "quickstart")


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_free_form_dicts_take_new_names(plus: str) -> None:
    run = compose(
        [
            f"{plus}data.filters.min_chars.limit=5",
            f"{plus}zero.extra.reduce_bucket_size=9",
            f"{plus}objective.name=o",
            f"{plus}objective.options.x=y",
        ]
    )
    assert run.data.filters == {"min_chars": {"limit": 5}}
    assert run.zero.extra == {"reduce_bucket_size": 9}
    assert run.objective.options == {"x": "y"}
    assert compose([f"{plus}data.filters={{a: {{b: 1}}}}"]).data.filters == {"a": {"b": 1}}


def test_a_filter_of_an_experiment_can_be_removed() -> None:
    run = compose(["experiment=quickstart", "~data.filters.min_chars"])
    assert set(run.data.filters) == {"max_chars"}


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("corpus.path=/a/b c.txt", "/a/b c.txt"),
        ("corpus.path=/a/*.jsonl", "/a/*.jsonl"),
        ("corpus.path=[/a,/b]", ["/a", "/b"]),
        ("corpus.path='/a=b,c'", "/a=b,c"),
        ('corpus.path="/é#1"', "/é#1"),
        ("corpus.path=null", None),
    ],
)
def test_corpus_paths(typed: str, path: object) -> None:
    assert compose([typed]).corpus.path == path


def test_values_have_their_types() -> None:
    run = compose(["train.precision=bf16", "stages=[prepare,train]", "optim.lr=1", "run.name=5", "run.fresh=yes"])
    assert run.train.precision is Precision.bf16
    assert run.stages == [Stage.prepare, Stage.train]
    assert isinstance(run.optim.lr, float)
    assert (run.run.name, run.run.fresh) == ("5", True)


def test_another_key_can_be_filled_in_and_dollars_escaped() -> None:
    run = compose(["train.steps=${train.eval_every}", r"train.sample_prompts=['\${x:y}']"])
    assert run.train.steps == run.train.eval_every
    assert run.train.sample_prompts == ["${x:y}"]


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    compose(["experiment=quickstart"])
    assert os.getcwd() == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert list(logging.getLogger().handlers) == handlers


# --- what is refused

REFUSED = [
    # what is typed, what the first line says, what the way out says
    ("trian.steps=5", "trian.steps=5: no such key (did you mean 'train.steps'?)", "--cfg job"),
    ("train.stpes=5", "did you mean 'train.steps'", ""),
    ("+train.lrr=5", "train.lrr=5: no such key (did you mean 'optim.lr'?)", ""),
    ("++train.lrr=5", "train.lrr=5: no such key (did you mean 'optim.lr'?)", ""),
    ("~train.lrr", "train.lrr=: no such key", ""),
    ("steps=4", "did you mean 'train.steps'", ""),
    ("train/steps=4", "did you mean 'train.steps'", ""),
    ("modle=nano", "did you mean 'model'", ""),
    ("quickstart", "did you mean 'experiment=quickstart'", ""),
    ("train.steps", "written key=value", "train.steps=200"),
    ("+foo.bar=1", "foo.bar=1: no such key", "--cfg job"),
    ("model=nno", "model=nno: no such option (did you mean 'nano'?)", "gpt2_size, nano, quick, small"),
    ("model=null", "no such option", "options: "),
    ("model=[nano,small]", "no such option", "options: "),
    ("model={width: 3}", "no such option", "model.key=value"),
    ("~model", "one of each group", "options: "),
    ("model@x=nano", "one place", ""),
    ("train={steps: 3}", "group of keys", "train.steps=200"),
    ("train.steps=abc", "train.steps=abc: must be a whole number", "train.steps=200"),
    ("train.steps=2.5", "must be a whole number", ""),
    ("train.steps=true", "must be a whole number", ""),
    ("train.steps=null", "must be a whole number", ""),
    ("train.steps.x=1", "train.steps is a whole number", "train.steps=200"),
    ("stages.0=train", "stages is a list", "stages=[prepare"),
    ("train.precision=FP32", "one of fp32, bf16 (did you mean 'fp32'?)", "train.precision=fp32"),
    ("stages=[prepare,trian]", "did you mean 'train'", "stages=[prepare"),
    ("stages=train", "must be a list", ""),
    ("stages=[]", "nothing to do", ""),
    ("stages=[train,train]", "named twice", "stages=[train]"),
    ("run.allow=a", "must be a list", "run.allow=[a,b]"),
    ("run.fresh=2", "true or false", "run.fresh=false"),
    ("run.name='a b'", "one folder name", "run.name=first"),
    ("run.name=../x", "one folder name", ""),
    ("run.name=???", "no value yet", ""),
    ("run.seed=-1", "from 0", ""),
    ("~train.steps", "cannot be removed", "train.steps=200"),
    ("~data.filters", "removes all", "~data.filters.name"),
    ("~data.filters.x", "not there", ""),
    ("data.filters.min_chars=5", "parameters by name", "data.filters.min_chars.limit=200"),
    ("data.filters=3", "names with values", ""),
    ("optim.lr=nan", "above 0", ""),
    ("optim.lr=0", "above 0", "optim.lr=0.001"),
    ("optim.beta2=1", "below 1", ""),
    ("train.steps=0", "above 0", ""),
    ("train.clip_norm=-1", "above 0", "train.clip_norm=1.0"),
    ("cluster.max_restarts=-1", "0 or more", ""),
    ("zero.stage=4", "no such ZeRO stage", "0, 1, 2 or 3"),
    ("corpus.path=5", "a path, a glob", ""),
    ("version=2", "reads version 1", ""),
    # bounds and options
    ("train.steps=1000000001", "at most 1000000000", "train.steps=200"),
    ("tokenizer.vocab_size=20000000", "at most 16777216", "tokenizer.vocab_size=4096"),
    ("model.rope_theta=0", "above 0", "model.rope_theta=10000.0"),
    ("train.sample_tokens=-1", "0 or more", "train.sample_tokens=0"),
    ("data.heldout_fraction=0", "held-out text", "stages=[prepare]"),
    ("data.heldout_fraction=1", "below 1", "data.heldout_fraction=0.02"),
    ("paths.runs=''", "paths.runs='': must name a folder", "paths.runs=runs"),
    ("paths.store=''", "must name a folder", "paths.store=store"),
    ("model.options.x=1", "model.options.x=1: model.name=decoder takes no options", "leave out"),
    ("objective.options.x=1", "objective.name=causal_lm takes no options", "leave out"),
    ("optim.options.amsgrd=true", "did you mean 'amsgrad'", "known: amsgrad, foreach"),
    ("optim.options.betas=[1,2]", "no such setting", "known: "),
    ("optim.options.amsgrad=1", "must be true or false", "optim.options.amsgrad=true"),
    ("zero.extra.overlap_comm=5", "must be true or false", "zero.extra.overlap_comm=true"),
    ("zero.extra.overlap_comm=null", "must be true or false", ""),
    ("zero.extra.reduce_bucket_size=true", "a whole number", "zero.extra.reduce_bucket_size="),
    ("zero.extra.reduce_bucket_size=many", "a whole number", ""),
    ("zero.extra.reduce_bucket_size=-1", "a whole number of 0 or more", ""),
    ("zero.extra.reduce_bucket_size=1.5", "a whole number", ""),
    # names below a name
    ("+train.foo=1", "train.foo=1: no such key", "keys of train: steps, global_batch_rows"),
    ("model=huge", "no such option", "gpt2_size, nano, quick, small; what a plugin registered is named by model.name="),
    (
        "optim=lion",
        "optim=lion: no such option",
        "options: adamw; what a plugin registered is named by optim.name=lion",
    ),
    ("corpus.path={a: 1}", "corpus.path is a value", "corpus.path=/data/*.jsonl"),
    ("tokenizer.path.x=1", "tokenizer.path is a text or null", "tokenizer.path=/data/tokenizer.json"),
    ("~tracker.entity", "cannot be removed", "tracker.entity=name"),
    # combinations
    ("data.row_tokens=4096", "longer than model.max_positions=1024", "data.row_tokens=1024"),
    ("zero.stage=3 train.engine=plain", "has no ZeRO", "train.engine=deepspeed"),
    ("model.heads=5", "must divide model.heads=5", "model.kv_heads=5"),
    ("model.width=100 model.heads=6", "must divide model.width=100", ""),
    ("corpus=jsonl", "corpus.path=null", "corpus.path=/data"),
    ("tokenizer=file", "tokenizer.path=null", "tokenizer.path=/data"),
    ("train.keep_checkpoints=1", "at least 2", "train.keep_checkpoints=2"),
    # syntax and interpolation
    ("train.steps=1,2", "several values", "--multirun"),
    ("corpus.path=/a,b", "several values", "'corpus.path=\"/a,b\"'"),
    ("corpus.path=/a=b", "corpus.path=/a=b: is not written", "'corpus.path=\"/a=b\"'"),
    ("corpus.path=/é", "is not written", "quote"),
    ("train.steps=${train.stepz}", "'train.stepz' not found (did you mean 'train.steps'?)", ""),
    ("run.name=${run.name}", "Recursive", ""),
    ("train.steps=${run.name}", "no whole number", "train.steps=200"),
    # what would be executed
    ("model._target_=os.system", "nothing in it is imported", "plugins=[module]"),
    ("+_target_=os.system", "nothing in it is imported", ""),
    ("data.filters={x: {_target_: os.system}}", "nothing in it is imported", ""),
    ("zero.extra._target_=os.system", "nothing in it is imported", ""),
    ("zero.extra.round_robin_gradients=true", "wrong parameters' names", "leave out"),
    ("zero.extra.reduce_bucket=9", "did you mean 'reduce_bucket_size'?", "known: "),
    ("hydra.run.dir=/x", "Hydra's own settings", ""),
    ("+hydra.callbacks.x._target_=os.system", "nothing in it is imported", ""),
    ("hydra/launcher=basic", "Hydra's own settings", ""),
    ("run.name=${hydra:job.name}", "only ${other.key}", ""),
    ("train.sample_prompts=['${a:1}']", "only ${other.key}", r"\${"),
]


@pytest.mark.parametrize(("typed", "first", "way_out"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(typed: str, first: str, way_out: str) -> None:
    lines = refused(*(typed.split(" ") if " " in typed and "{" not in typed and "'" not in typed else [typed]))
    assert first in lines[0]
    assert len(lines) > 1, "no way out"
    assert way_out in lines[1]


@pytest.mark.parametrize(
    "typed",
    ["run.name=${oc.env:ZR_SECRET}", "model.options.x='a ${ oc.env : ZR_SECRET }'", "model=${oc.env:ZR_SECRET}"],
)
def test_the_environment_is_never_read_into_a_run(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZR_SECRET", "hunter2")
    lines = refused(typed)
    assert "environment" in lines[0]
    assert "hunter2" not in "".join(lines)


def test_what_passes_through_has_its_type() -> None:
    run = compose(["zero.extra.reduce_bucket_size=5e8", "zero.extra.overlap_comm=false", "optim.options.amsgrad=true"])
    assert run.zero.extra == {"reduce_bucket_size": 5e8, "overlap_comm": False}
    assert run.optim.options == {"amsgrad": True}
    assert compose(["stages=[prepare]", "data.heldout_fraction=0"]).data.heldout_fraction == 0


def test_adamw_has_the_options_that_we_pass() -> None:
    import torch

    theirs = inspect.signature(torch.optim.AdamW).parameters
    assert set(ADAMW) == set(theirs) - {"params", "lr", "betas", "eps", "weight_decay", "capturable", "differentiable"}


# --- YAML of one's own


def own(folder: Path, text: str, group: str = "experiment", option: str = "mine") -> str:
    """A config folder with one file in it."""
    (folder / group).mkdir()
    (folder / group / f"{option}.yaml").write_text(text)
    return str(folder)


def test_own_experiments(tmp_path: Path) -> None:
    folder = own(tmp_path, "# @package _global_\ndefaults:\n- override /model: nano\nrun: {name: mine}\n")
    run = compose(["experiment=mine"], folder)
    assert (run.run.name, run.model.width) == ("mine", 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {steps: 1}", "trian"),
        ("train: {stepz: 1}", "train.stepz=... (in experiment/mine.yaml): no such key (did you mean 'train.steps'?)"),
        ("train: {steps: abc}", "train.steps=abc: must be a whole number"),
        ("data: {filters: {x: {_target_: os.system}}}", "nothing in it is imported"),
        ("run: {name: '${oc.env:ZR_SECRET}'}", "only from the environment"),
        ("train: {sample_prompts: ['${oc.env:ZR_SECRET}']}", "only from the environment"),
        ("defaults: [{override /model: smal}]", "model=smal: no such option (did you mean 'small'?)"),
        ("train: [", "mine.yaml"),
        ("train: {steps: 1, steps: 2}", "duplicate key steps"),
    ],
)
def test_own_experiments_are_checked_alike(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZR_SECRET", "hunter2")
    folder = own(tmp_path, f"# @package _global_\n{text}\n")
    lines = refused("experiment=mine", config_dir=folder)
    assert said in lines[0]
    assert "hunter2" not in "".join(lines)


def test_own_folders_are_checked(tmp_path: Path) -> None:
    assert "no such folder" in refused(config_dir=str(tmp_path / "none"))[0]
    assert "exists in zeroray" in refused(config_dir=own(tmp_path, "layers: 2", "model", "nano"))[0]
    (tmp_path / "model" / "nano.yaml").unlink()
    assert "did you mean 'optim'" in refused(config_dir=own(tmp_path, "lr: 1", "optims", "x"))[0]


# --- a run as a file


def test_a_saved_run_is_read_without_resolving_anything(tmp_path: Path) -> None:
    run = compose(["experiment=quickstart"])
    run.train.sample_prompts = ["${oc.env:HOME}", "é \n '"]
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(str(path)) == run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {stepz: 1}", "did you mean 'train.steps'"),
        ("train: {steps: abc}", "train.steps=abc: must be a whole number"),
        ("train: {steps: true}", "train.steps=true: must be a whole number"),
        ("train: 3", "train=3: is a group of keys"),
        ("version: 2", "reads version 1"),
        ("- 1", "holds no run"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("a: [", "not YAML"),
        ("stages: [prepare, x]", "one of prepare"),
    ],
)
def test_a_damaged_saved_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        load_run(str(tmp_path / "run.yaml"))
    assert said in str(caught.value)


OPERATIONAL = """
version run.name run.fresh run.allow paths.runs paths.store stages data.quarantine_limit model.attention train.engine
train.micro_batch_rows train.loss_chunk_tokens train.eval_every train.eval_rows train.checkpoint_every
train.keep_checkpoints train.log_every train.sample_tokens train.sample_prompts zero.stage zero.extra cluster.address
cluster.ranks cluster.workers cluster.cpus_per_rank cluster.gpus_per_rank cluster.dashboard_port
cluster.start_timeout_s cluster.max_restarts tracker.wandb tracker.project tracker.entity tracker.group tracker.tags
"""


def test_which_keys_change_the_result() -> None:
    kept = set(flatten(scientific(Run())))
    dropped = {key for key in leaf_types() if key not in kept}
    assert dropped >= set(OPERATIONAL.split()), "an operational key would now refuse a resume"
    grown = {key for key in dropped - set(OPERATIONAL.split()) if key.startswith(("corpus.", "model.", "optim."))}
    assert not grown, "a key that changes the result is marked operational"


def test_differences_name_scientific_keys_only() -> None:
    before = scientific(compose(["experiment=quickstart"]))
    operational = ["zero.stage=3", "cluster.ranks=3", "paths.runs=x", "run.name=y", "train.eval_every=7"]
    assert differences(before, scientific(compose(["experiment=quickstart", *operational]))) == []
    changed = ["optim.lr=1", "run.seed=3", "data.filters.min_words.limit=5", "~data.filters.max_chars"]
    assert differences(before, scientific(compose(["experiment=quickstart", *changed]))) == [
        ("data.filters.max_chars.limit", 1000000, "(unset)"),
        ("data.filters.min_words.limit", "(unset)", 5),
        ("optim.lr", 3e-3, 1.0),
        ("run.seed", 0, 3),
    ]


# --- the command line of `zeroray run`


def told(argv: list[str], codes: list[int] | None = None) -> tuple[int, list[Run]]:
    """Run the command line with a task that notes its runs and returns `codes` in turn."""
    done: list[Run] = []
    answers = itertools.chain(codes or [], itertools.repeat(0))

    def task(run: Run) -> int:
        done.append(run)
        return next(answers)

    return run_app(argv, task), done


def test_one_run() -> None:
    code, runs = told(["experiment=quickstart", "train.steps=3"], [5])
    assert (code, [run.train.steps for run in runs]) == (5, [3])


def test_several_runs_have_their_own_names_in_order() -> None:
    code, runs = told(["train.steps=1,2", "--multirun", "zero=zero1,zero2", "run.seed=4"])
    assert code == 0
    assert [(run.train.steps, run.zero.stage, run.run.seed) for run in runs] == [
        (1, 1, 4),
        (1, 2, 4),
        (2, 1, 4),
        (2, 2, 4),
    ]
    assert [run.run.name for run in runs] == [f"default-train.steps_{s}-zero_zero{z}" for s in (1, 2) for z in (1, 2)]


def test_several_runs_with_names_of_their_own_keep_them() -> None:
    assert [run.run.name for run in told(["-m", "experiment=glob(*)"])[1]] == GROUPS["experiment"]
    assert [run.run.name for run in told(["-m", "run.name=a,b"])[1]] == ["a", "b"]
    assert [run.run.name for run in told(["-m", "train.steps=5"])[1]] == ["default"]
    assert len(told(["-m", "train.steps=range(1,4)"])[1]) == 3


def test_long_and_alike_names_are_told_apart() -> None:
    changes = [["corpus.path=" + "a/" * 90 + end] for end in ("x", "y")]
    found = job_names([Run(), Run()], changes)
    assert len(set(found)) == 2
    assert max(map(len, found)) <= 120
    assert len(set(job_names([Run(), Run()], [["corpus.path=a/b"], ["corpus.path=a_b"]]))) == 2


@pytest.mark.parametrize(
    ("codes", "worst", "started"),
    [
        ([0, 3, 0], 3, 3),
        ([2, 1, 0], 1, 3),
        ([0, 2, 3], 2, 3),
        ([0, 6, 0], 6, 2),
        ([4, 5, 0], 4, 3),
        ([0, 137, 1], 137, 3),
    ],
)
def test_the_worst_exit_code_wins_and_a_stop_stops(codes: list[int], worst: int, started: int) -> None:
    code, runs = told(["-m", "train.steps=1,2,3"], codes)
    assert (code, len(runs)) == (worst, started)


def test_a_run_that_fails_does_not_keep_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def task(run: Run) -> int:
        if run.train.steps == 1:
            raise ValueError("train.steps=1: too few")
        if run.train.steps == 2:
            raise RuntimeError("broken")
        return 0

    assert run_app(["-m", "train.steps=1,2,3"], task) == 1
    said = capsys.readouterr().err
    assert "too few" in said
    assert "RuntimeError: broken" in said
    assert "default-train.steps_3: exit 0" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-m", "train.steps=1,x"], "must be a whole number"),
        (["-m", "zero=zero1,zero9"], "zero=zero9"),
        (["-m", "optim.lr=interval(1,2)"], "cannot be counted off"),
        (["--mutlirun"], "did you mean '--multirun'"),
        (["--resolve"], "belong to --cfg job"),
        (["--cfg", "hydra"], "choose from"),
        (["--cfg", "job", "--package", "trian"], "did you mean"),
        (["--experimental-rerun", "x.pickle"], "unrecognized"),
    ],
)
def test_nothing_is_started_when_something_is_wrong(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        run_app(argv, lambda run: pytest.fail("started"))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_cfg_job_prints_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(["--cfg", "job", "--resolve", "experiment=quickstart"]) == (0, [])
    assert capsys.readouterr().out == (HERE / "quickstart.yaml").read_text()
    told(["--cfg", "job", "-p", "train.steps", "train.steps=${train.log_every}"])
    assert capsys.readouterr().out == "${train.log_every}\n"
    told(["--cfg", "job", "--resolve", "-p", "train.steps", "train.steps=${train.log_every}"])
    assert capsys.readouterr().out == "10\n"
    told(["-m", "--cfg", "job", "-p", "train.steps", "train.steps=1,2"])
    assert capsys.readouterr().out == "--- # default-train.steps_1\n1\n--- # default-train.steps_2\n2\n"


def test_help_shows_groups_options_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(["--help"]) == (0, [])
    text = capsys.readouterr().out
    for group, options in GROUPS.items():
        assert group in text
        assert all(option in text for option in options)
    assert "zeroray_run" not in text
    assert max(map(len, text.splitlines())) <= 120
    examples = [line for line in text.splitlines() if line.startswith("  zeroray run ")]
    assert len(examples) >= 4
    for line in examples:
        assert told([*line.replace("'", "").split()[2:], "--cfg", "job"])[0] == 0


COMMANDS = ["run", "status", "stop"]
COMPLETED = [
    ("zeroray s", ["status", "stop"]),
    ("zeroray run mod", ["model.", "model="]),
    ("zeroray run experiment=quickstart mode", ["model.", "model="]),
    ("zeroray run model=", GROUPS["model"]),
    ("zeroray run model=n", ["nano"]),
    ("zeroray run +model=n", ["nano"]),
    ("zeroray run train.eval", ["train.eval_every=", "train.eval_rows="]),
    ("zeroray run train.precision=", ["fp32", "bf16"]),
    ("zeroray run train.steps=", ["200"]),
    ("zeroray run data.fi", ["data.filters."]),
    ("zeroray run --mu", ["--multirun"]),
    ("zeroray run hydra", []),
    ("zeroray run zeroray", []),
    ("zeroray status fi", ["first"]),
]


@pytest.mark.parametrize(("line", "last"), COMPLETED)
def test_completion(line: str, last: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    head = line.rsplit(" ", maxsplit=1)[-1].rpartition("=")
    assert candidates(line, COMMANDS) == [f"{head[0]}{head[1]}{name}" for name in last]


def test_completion_in_bash_replaces_the_part_after_the_equals_sign(tmp_path: Path) -> None:
    stub = tmp_path / "zeroray"
    program = f"import sys; from conf.completion import shell; shell(sys.argv[2:], {COMMANDS}, sys.stdout)"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    stub.chmod(0o755)
    line = "zeroray run train.precision=b"
    typed = f"COMP_LINE='{line}' COMP_POINT={len(line)}"
    ask = f"{BASH}\n{typed}\n_zeroray_complete {stub}\nprintf '%s' \"${{COMPREPLY[@]}}\""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "bf16", done.stderr


def test_completion_needs_no_hydra_and_composing_no_torch() -> None:
    program = (
        "import sys, conf.completion; assert 'hydra' not in sys.modules; import conf.app; "
        "assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HERE.parent)


# --- names that are found


def test_registry_finds_ours_and_suggests() -> None:
    registry = Registry("zeroray.nothing", "thing.name")
    registry.register("first")(test_which_keys_change_the_result)
    assert registry.get("first") is test_which_keys_change_the_result
    with pytest.raises(ValueError, match=r"thing\.name=frist: no such name \(did you mean 'first'\?\)"):
        registry.get("frist")
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("first")(Path)


def test_plugins_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zr_plugin_a.py").write_text(
        "from conf.registry import FILTERS\n@FILTERS.register('zr_no_tabs')\ndef no_tabs(text): return None\n"
    )
    from conf.registry import FILTERS

    load_plugins(["zr_plugin_a"], str(tmp_path))
    assert FILTERS.get("zr_no_tabs")("x") is None
    assert "zr_no_tabs" in FILTERS.names()
    load_plugins(["zr_plugin_a"], str(tmp_path))


@pytest.mark.parametrize("name", ["zr_no_such_module", "../evil", "a b", "os;x", "", "/etc/x.py"])
def test_plugins_that_are_no_modules_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"plugins=\["):
        load_plugins([name], str(tmp_path))


def test_a_plugin_with_a_missing_import_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zr_plugin_b.py").write_text("import zr_missing_library\n")
    with pytest.raises(ModuleNotFoundError, match="zr_missing_library"):
        load_plugins(["zr_plugin_b"], str(tmp_path))


def test_entry_points_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zr_package.py").write_text("def no_tabs(text): return 'tabs'\n")
    info = tmp_path / "zr_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zr-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zeroray.test_things]\nno_tabs = zr_package:no_tabs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("zeroray.test_things", "thing.name")
    assert registry.names() == ["no_tabs"]
    assert registry.get("no_tabs")("x") == "tabs"


def test_a_saved_run_is_plain(tmp_path: Path) -> None:
    assert plain(compose(["train.precision=bf16"]))["train"]["precision"] == "bf16"
