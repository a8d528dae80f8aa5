"""launch/kubernetes: valid by Kubernetes' own schemas, and in agreement with the code.

No cluster runs here: the manifests are validated, not executed.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from facedist import errors, evaluate
from facedist.distributed import detect
from facedist.training.config import TrainConfig
from tfrecords_tools.builder import options

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
CRDS = "FACEDIST_CRDS"
VERSIONS = ("1.28", "1.34", "1.37")
KUSTOMIZATIONS = sorted(FOLDER.rglob("kustomization.yaml"))
APPLIED = [
  path.parent
  for path in KUSTOMIZATIONS
  if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
]
BASES = [folder for folder in APPLIED if "overlays" not in folder.parts]
COMMANDS: dict[str, type] = {
  "facedist.train": TrainConfig,
  "facedist.evaluate": evaluate.EvaluateConfig,
  "tfrecords_tools.build": options.BuildConfig,
}
OTHER_CODES = {126, 127}  # of a command that cannot be run
SECONDS_TO_SPARE = 5.0

Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Launched:
  """A job of the manifests, be it in a JobSet or by itself.

  Attributes:
    name: Of the Job as the cluster will have it.
    service: Name of the headless service that its pods are in, or "".
    job: Its spec.
    settings: The ConfigMap's data.
  """

  name: str
  service: str
  job: Document
  settings: dict[str, str]

  @property
  def pod(self) -> Document:
    return self.job["template"]["spec"]

  @property
  def container(self) -> Document:
    (container,) = self.pod["containers"]
    return container

  @property
  def module(self) -> str:
    python, minus_m, module = self.container["args"][:3]
    assert (python, minus_m) == ("python", "-m")
    return module

  @property
  def flags(self) -> dict[str, str]:
    words = [word.partition("=") for word in self.container["args"][3:]]
    return {name.removeprefix("--"): value for name, _, value in words}

  def environment(self, index: int) -> dict[str, str]:
    """Returns what the container of pod `index` has as variables."""
    found = dict(self.settings)
    for entry in self.container.get("env", []):
      if "value" in entry:
        found[entry["name"]] = entry["value"]
      else:
        path = entry["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == "metadata.labels['batch.kubernetes.io/job-name']"
        found[entry["name"]] = self.name
    if self.job.get("completionMode") == "Indexed":
      found["JOB_COMPLETION_INDEX"] = str(index)
    return found


def render(folder: pathlib.Path) -> list[Document]:
  """Returns the manifests of a kustomization, as kubectl would apply them."""
  program = shutil.which("kubectl")
  if program is None:
    pytest.skip("kubectl is not installed; it renders the kustomizations")
  result = subprocess.run(
    [program, "kustomize", str(folder)],
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert (result.returncode, result.stderr) == (0, "")
  return list(yaml.safe_load_all(result.stdout))


def launched(documents: list[Document]) -> Iterator[Launched]:
  """Yields every job among the manifests."""
  (settings,) = (each["data"] for each in documents if each["kind"] == "ConfigMap")
  for document in documents:
    name, spec = document["metadata"]["name"], document.get("spec")
    if document["kind"] == "Job":
      service = spec["template"]["spec"].get("subdomain", "")
      yield Launched(name, service, spec, settings)
    elif document["kind"] == "JobSet":
      for each in spec["replicatedJobs"]:
        assert each["replicas"] == 1
        job = each["template"]["spec"]
        service = spec["network"]["subdomain"]
        yield Launched(f"{name}-{each['name']}-0", service, job, settings)


@pytest.fixture(
  params=APPLIED, ids=lambda folder: str(folder.relative_to(FOLDER)), scope="module"
)
def documents(request: pytest.FixtureRequest) -> list[Document]:
  """The manifests of each kustomization."""
  return render(request.param)


@pytest.fixture(scope="module")
def jobset() -> jsonschema.Draft202012Validator:
  """JobSet's published schema, made to refuse all fields but its own."""
  path = pathlib.Path(os.environ.get(CRDS, "")) / "jobset.x-k8s.io_jobsets.yaml"
  if not path.exists():
    pytest.skip(f"{CRDS} names no folder with {path.name}, JobSet's published schema")
  definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
  (version,) = definition["spec"]["versions"]
  assert version["name"] == "v1alpha2"
  schema = version["schema"]["openAPIV3Schema"]
  assert schema["properties"]["metadata"] == {"type": "object"}  # so it stays open
  return jsonschema.Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
  """Returns an OpenAPI schema as a JSON schema that refuses unknown fields."""
  if isinstance(schema, list):
    return [closed(each) for each in schema]
  if not isinstance(schema, dict):
    return schema
  if schema.get("x-kubernetes-int-or-string"):
    return {"type": ["integer", "string"]}
  made = {name: closed(value) for name, value in schema.items()}
  if schema.get("type") == "object" and "properties" in schema:
    made["additionalProperties"] = False
  return made


def test_the_closed_schema_refuses_what_it_should(
  jobset: jsonschema.Draft202012Validator,
):
  good = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {}}
  jobset.validate(good | {"spec": {}})
  rule = {"name": "permanent", "action": "Panic"}
  for spec in ({"replicas": 1}, {"failurePolicy": {"rules": [rule]}}):
    with pytest.raises(jsonschema.ValidationError):
      jobset.validate(good | {"spec": spec})


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_strictly_valid(documents: list[Document], version: str):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for document in documents:
      if document["kind"] != "JobSet":
        assert kubernetes_validate.validate(document, version, strict=True) == version
      else:  # its jobs are plain ones
        for each in document["spec"]["replicatedJobs"]:
          job = {"apiVersion": "batch/v1", "kind": "Job", **each["template"]}
          assert kubernetes_validate.validate(job, version, strict=True) == version


def test_every_jobset_is_strictly_valid(
  documents: list[Document], jobset: jsonschema.Draft202012Validator
):
  for document in documents:
    if document["kind"] == "JobSet":
      jobset.validate(document)


@pytest.mark.parametrize(
  "path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(FOLDER))
)
def test_a_kustomization_names_all_that_lies_beside_it_and_nothing_else(
  path: pathlib.Path,
):
  content = yaml.safe_load(path.read_text())
  named = [*content.get("resources", []), *content.get("components", [])]
  named += [patch["path"] for patch in content.get("patches", [])]
  for name in named:
    target = path.parent / name
    assert target.is_file() or (target / "kustomization.yaml").is_file(), name
  beside = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
  assert {name for name in named if name.endswith(".yaml")} == beside


def test_every_flag_exists_and_every_variable_in_it_is_set(documents: list[Document]):
  for each in launched(documents):
    known = {"flagfile"} | {
      field.name for field in dataclasses.fields(COMMANDS[each.module])
    }
    assert set(each.flags) <= known
    variables = set(re.findall(r"\$\((\w+)\)", " ".join(each.container["args"])))
    assert variables <= set(each.environment(0))


def test_every_worker_finds_all_the_others_at_the_names_they_will_have(
  documents: list[Document],
):
  services = {
    each["metadata"]["name"]: each["spec"]
    for each in documents
    if each["kind"] == "Service"
  }
  jobset = any(each["kind"] == "JobSet" for each in documents)
  for each in launched(documents):
    if each.module != "facedist.train":
      alone = detect.from_environment(each.environment(0))
      assert alone.workers == ()
      continue
    count = each.job["completions"]
    assert each.job["parallelism"] == count
    assert each.job["completionMode"] == "Indexed"
    (port,) = (entry["containerPort"] for entry in each.container["ports"])
    job = "facedist-workers-0" if jobset else "facedist-train"
    expected = tuple(f"{job}-{index}.facedist:{port}" for index in range(count))
    for index in range(count):
      found = detect.from_environment(each.environment(index))
      assert (found.workers, found.index) == (expected, index)
    assert each.service == "facedist"
    if not jobset:
      service = services["facedist"]
      assert service["clusterIP"] == "None"
      assert service["publishNotReadyAddresses"]
      assert [entry["port"] for entry in service["ports"]] == [port]
      labels = each.job["template"]["metadata"]["labels"]
      assert service["selector"].items() <= labels.items()


def test_all_parts_of_a_build_have_a_pod(documents: list[Document]):
  for each in launched(documents):
    if each.module == "tfrecords_tools.build":
      count = each.environment(0)["NUM_TASKS"]
      assert each.flags["num_tasks"] == "$(NUM_TASKS)"
      if "finalize" not in each.flags:
        assert each.flags["task_index"] == "$(JOB_COMPLETION_INDEX)"
        assert str(each.job["completions"]) == count


def test_the_parts_and_the_finishing_of_a_build_agree():
  part, finish = (
    next(launched(render(FOLDER / name)))
    for name in ("build-shards", "build-shards/finalize")
  )
  assert finish.environment(0) == {
    name: value
    for name, value in part.environment(0).items()
    if name != "JOB_COMPLETION_INDEX"
  }
  assert finish.flags.keys() - part.flags.keys() == {"finalize"}


def test_the_failure_policy_is_the_table_of_exit_codes(documents: list[Document]):
  permanent = {int(code) for code in errors.ExitCode if 0 < code < 128}
  innocent = {
    errors.ExitCode.NOT_FORMED,
    errors.ExitCode.PREEMPTED,
    errors.ExitCode.PEER_LOST,
  }
  for each in launched(documents):
    evicted, failed, stopped = each.job["podFailurePolicy"]["rules"]
    assert evicted["onPodConditions"] == [
      {"type": "DisruptionTarget", "status": "True"}
    ]
    assert (evicted["action"], stopped["action"]) == ("Ignore", "Ignore")
    assert failed["action"] == "FailJob"
    assert set(failed["onExitCodes"]["values"]) == permanent | OTHER_CODES
    assert set(stopped["onExitCodes"]["values"]) == innocent
    for rule in (failed, stopped):
      assert rule["onExitCodes"]["containerName"] == each.container["name"]
      assert rule["onExitCodes"]["operator"] == "In"
      assert rule["onPodConditions"] == []
    assert each.pod["restartPolicy"] == "Never"  # Kubernetes demands it
    assert each.job["backoffLimit"] > 0


def test_a_permanent_failure_ends_the_jobset(documents: list[Document]):
  for document in documents:
    if document["kind"] == "JobSet":
      (rule,) = document["spec"]["failurePolicy"]["rules"]
      assert rule["action"] == "FailJobSet"
      assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_pod_has_longer_to_end_than_training_takes_to_save(documents: list[Document]):
  for each in launched(documents):
    seconds = float(each.settings["GRACE_SECONDS"])
    assert each.pod["terminationGracePeriodSeconds"] >= seconds + SECONDS_TO_SPARE
    if each.module == "facedist.train":
      assert each.flags["grace_seconds"] == "$(GRACE_SECONDS)"


def test_liveness_looks_at_the_file_that_training_renews(
  documents: list[Document], tmp_path: pathlib.Path
):
  for each in launched(documents):
    if each.module != "facedist.train":
      continue
    path = each.flags["heartbeat_file"]
    assert each.container["startupProbe"]["exec"]["command"] == ["test", "-e", path]
    shell, minus_c, line = each.container["livenessProbe"]["exec"]["command"]
    assert (shell, minus_c) == ("sh", "-c")
    touched = tmp_path / "heartbeat"
    touched.touch()
    probe = [shell, minus_c, line.replace(path, str(touched))]
    assert subprocess.run(probe, check=False).returncode == 0
    hour_ago = touched.stat().st_mtime - 3600
    os.utime(touched, (hour_ago, hour_ago))
    assert subprocess.run(probe, check=False).returncode == 1


def test_no_pod_has_a_privilege_or_writes_outside_its_volumes(
  documents: list[Document],
):
  for each in launched(documents):
    security = each.pod["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] >= 1000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not each.pod["automountServiceAccountToken"]
    for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers"):
      assert key not in each.pod
    own = each.container["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert (own["privileged"], own["allowPrivilegeEscalation"]) == (False, False)
    volumes = {volume["name"]: volume for volume in each.pod["volumes"]}
    mounts = {mount["name"]: mount for mount in each.container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert not any("hostPath" in volume for volume in volumes.values())
    assert mounts["scratch"]["mountPath"] == "/tmp"


def test_every_container_says_what_it_needs(documents: list[Document]):
  for each in launched(documents):
    resources = each.container["resources"]
    for kind in ("memory", "ephemeral-storage"):
      assert resources["requests"][kind] == resources["limits"][kind]
    assert "cpu" in resources["requests"]


def test_gke_s_pods_use_spot_nodes_identity_gpus_and_local_ssds():
  documents = render(FOLDER / "overlays/gke-gpu/train")
  (account,) = (each for each in documents if each["kind"] == "ServiceAccount")
  assert "iam.gke.io/gcp-service-account" in account["metadata"]["annotations"]
  trainer, evaluator = launched(documents)
  for each in (trainer, evaluator):
    assert each.pod["serviceAccountName"] == account["metadata"]["name"]
    assert each.pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert int(each.container["resources"]["limits"]["nvidia.com/gpu"]) > 0
    assert each.pod["terminationGracePeriodSeconds"] <= 25  # what GKE grants
  ssd = "cloud.google.com/gke-ephemeral-storage-local-ssd"
  assert trainer.pod["nodeSelector"][ssd] == "true"
  places = [mount["mountPath"] for mount in trainer.container["volumeMounts"]]
  assert trainer.settings["CACHE_DIR"] in places
  for name in ("DATA_DIR", "WORKDIR", "VERIFICATION_DATA"):
    assert trainer.settings[name].startswith("gs://")


def test_a_worker_s_name_resolves_before_its_pod_is_ready(documents: list[Document]):
  for document in documents:
    if document["kind"] == "JobSet":
      network = document["spec"]["network"]
      assert network["enableDNSHostnames"]
      assert network["publishNotReadyAddresses"]


def test_a_run_is_one_job_of_workers_and_one_evaluator(documents: list[Document]):
  modules = sorted(each.module for each in launched(documents))
  assert modules in (
    ["facedist.evaluate", "facedist.train"],
    ["tfrecords_tools.build"],
    [],  # what all share
  )


def test_the_pods_of_a_lost_node_are_replaced_after_half_a_minute(
  documents: list[Document],
):
  for each in launched(documents):
    seconds = {
      toleration["key"]: toleration["tolerationSeconds"]
      for toleration in each.pod["tolerations"]
      if toleration["effect"] == "NoExecute"
    }
    kinds = ("unreachable", "not-ready")
    assert seconds == {f"node.kubernetes.io/{kind}": 30 for kind in kinds}


def test_a_pod_that_waits_for_its_peers_is_not_taken_for_a_dead_one(
  documents: list[Document],
):
  for each in launched(documents):
    if each.module == "facedist.train":
      probe = each.container["startupProbe"]
      timeouts = probe["periodSeconds"] * probe["failureThreshold"]
      assert timeouts >= float(each.flags["start_timeout"])


def gibibytes(text: str) -> float:
  assert text.endswith("Gi")
  return float(text.removesuffix("Gi"))


def test_what_pods_write_fits_what_they_may_use(documents: list[Document]):
  for each in launched(documents):
    limits = each.container["resources"]["limits"]
    folders = [
      volume["emptyDir"] for volume in each.pod["volumes"] if "emptyDir" in volume
    ]
    used = {"ephemeral-storage": 0.0, "memory": 0.0}
    for folder in folders:
      kind = "memory" if folder.get("medium") == "Memory" else "ephemeral-storage"
      used[kind] += gibibytes(folder["sizeLimit"])
    assert 0 < used["ephemeral-storage"] <= gibibytes(limits["ephemeral-storage"])
    assert used["memory"] < gibibytes(limits["memory"])
