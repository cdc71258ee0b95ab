import os

import pytest

from torch_utils import distributed
from torch_utils.distributed import DistributedError, Job, Place, first_host, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[09-10],big",
    "SLURM_JOB_ID": "4711",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets the environment of a process; before that there is none of several."""
    for name in (*TORCHRUN, *SLURM, "SLURM_STEP_ID", "TORCHELASTIC_ERROR_FILE", distributed.JOB_FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")  # so that it is put back
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_a_process_by_itself_has_no_place_and_no_job(environment):
    assert distributed.place() is None
    assert distributed.job() is None
    environment(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})  # srun of one task, or sbatch's script
    assert distributed.place() is None


def test_torchrun(environment):
    environment(SLURM)  # that started an agent a node
    environment(TORCHRUN)
    assert distributed.place() == Place(5, 8, 1, 4, "node1", 29500, serves=False)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    environment({"RANK": "0", "LOCAL_RANK": "0"})
    assert distributed.place() == Place(0, 8, 0, 4, "node1", 29500, serves=False)
    environment({"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert distributed.place() == Place(0, 8, 0, 4, "node1", 29500, serves=True)


def test_slurm(environment):
    environment(SLURM)
    assert distributed.place() == Place(4, 5, 0, 1, "gpu09", 19711)
    environment({"SLURM_PROCID": "0", "SLURM_NODEID": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert distributed.place() == Place(0, 5, 0, 2, "10.0.0.1", 5000, serves=True)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[01-04,07],b7", "node01"),
        ("n[3,5]", "n3"),
        ("r[1-2]x,b", "r1x"),
        ("a-1,b", "a-1"),
        ("rack[1-2,4]node[03-04]x,b", "rack1node03x"),
    ],
)
def test_first_host_of_a_list(text, host):
    assert first_host(text) == host


def test_tasks_of_nodes():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


@pytest.mark.parametrize(
    ("base", "name", "value", "words"),
    [
        (TORCHRUN, "LOCAL_RANK", "", "LOCAL_RANK is not set.*torchrun.*unset RANK"),
        (TORCHRUN, "WORLD_SIZE", "two", "WORLD_SIZE is 'two'"),
        (TORCHRUN, "WORLD_SIZE", "5", "contradictory.*rank 5 of 5"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE", "2x", "SLURM_STEP_TASKS_PER_NODE is '2x'.*srun"),
        (SLURM, "SLURM_NODEID", "3", "names 3 nodes"),
    ],
)
def test_a_broken_environment_is_named(environment, base, name, value, words):
    environment(base | {name: value})
    with pytest.raises(DistributedError, match=words):
        distributed.place()


def test_a_job_remembers(environment, tmp_path):
    environment(TORCHRUN | {distributed.JOB_FOLDER: str(tmp_path)})
    job = distributed.job()
    assert (job.run_dir, job.failed) == (None, None)
    job.remember("runs/größer")
    job.fail(3)
    again = Job(tmp_path)
    assert (again.run_dir, again.failed) == ("runs/größer", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "failed", "run"]
    assert job.begun
    job.start()
    assert (again.begun, again.run_dir) == (False, "runs/größer")


def test_torchruns_folder_is_that_of_all_attempts(environment, tmp_path):
    folders = []
    for attempt, rank in ((0, 1), (2, 0)):
        error_file = tmp_path / "id_x1" / f"attempt_{attempt}" / str(rank) / "error.json"
        environment(TORCHRUN | {"TORCHELASTIC_ERROR_FILE": str(error_file)})
        folders.append(distributed.job().folder)
    assert folders == [tmp_path / "id_x1"] * 2
    environment({"TORCHELASTIC_ERROR_FILE": ""})
    assert distributed.job() is None
