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

from facedist import errors
from facedist.distributed import detect
from tests.test_paths_of_flags import config_class

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
OTHER_CODES = {126, 127}  # of a command that cannot be run
SECONDS_TO_SPARE = 5.0

Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Launched:
  """A job of the manifests, be it in a JobSet or by itself.

  Its `name` is that of the Job as the cluster will have it, `service` the headless
  service that its pods are in (or ""), `job` its spec, `settings` the ConfigMap's data.
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
def jobs(documents: list[Document]) -> list[Launched]:
  """The jobs of each kustomization."""
  return list(launched(documents))


@pytest.fixture(scope="module")
def trainers(jobs: list[Launched]) -> list[Launched]:
  """Those of the jobs that train: one, or none."""
  return [each for each in jobs if each.module == "facedist.train"]


@pytest.fixture(scope="module")
def jobsets(documents: list[Document]) -> list[Document]:
  """The JobSets of each kustomization: one, or none."""
  return [each for each in documents if each["kind"] == "JobSet"]


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
  jobsets: list[Document], jobset: jsonschema.Draft202012Validator
):
  for document in jobsets:
    jobset.validate(document)
    unknown = {"spec": document["spec"] | {"replicas": 1}}
    assert not jobset.is_valid(document | unknown)  # the schema is strict


@pytest.mark.parametrize(
  "path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(FOLDER))
)
def test_a_kustomization_names_all_that_lies_beside_it(path: pathlib.Path):
  content = yaml.safe_load(path.read_text())
  named = [*content.get("resources", []), *content.get("components", [])]
  named += [patch["path"] for patch in content.get("patches", [])]
  beside = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
  assert {name for name in named if name.endswith(".yaml")} == beside


def test_every_flag_exists_and_every_variable_in_it_is_set(jobs: list[Launched]):
  for each in jobs:
    known = {field.name for field in dataclasses.fields(config_class(each.module))}
    assert set(each.flags) <= known | {"flagfile"}
    variables = set(re.findall(r"\$\((\w+)\)", " ".join(each.container["args"])))
    assert variables <= set(each.environment(0))


def test_every_worker_finds_all_the_others_at_the_names_they_will_have(
  documents: list[Document], trainers: list[Launched], jobsets: list[Document]
):
  for each in trainers:
    count = each.job["completions"]
    assert each.job["parallelism"] == count
    assert each.job["completionMode"] == "Indexed"
    (port,) = (entry["containerPort"] for entry in each.container["ports"])
    job = "facedist-workers-0" if jobsets else "facedist-train"
    expected = tuple(f"{job}-{index}.facedist:{port}" for index in range(count))
    for index in range(count):
      found = detect.from_environment(each.environment(index))
      assert (found.workers, found.index) == (expected, index)
    assert each.service == "facedist"
    if not jobsets:
      (service,) = (one["spec"] for one in documents if one["kind"] == "Service")
      assert service["clusterIP"] == "None"
      assert service["publishNotReadyAddresses"]
      assert [entry["port"] for entry in service["ports"]] == [port]
      labels = each.job["template"]["metadata"]["labels"]
      assert service["selector"].items() <= labels.items()


def test_an_evaluator_follows_the_workers():
  modules = [each.module for each in launched(render(FOLDER / "base"))]
  assert sorted(modules) == ["facedist.evaluate", "facedist.train"]


def test_a_job_that_does_not_train_is_no_worker(jobs: list[Launched]):
  for each in jobs:
    if each.module != "facedist.train":
      assert detect.from_environment(each.environment(0)).workers == ()


def test_all_parts_of_a_build_have_a_pod(jobs: list[Launched]):
  for each in jobs:
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


def test_the_failure_policy_is_the_table_of_exit_codes(jobs: list[Launched]):
  permanent = {int(code) for code in errors.ExitCode if 0 < code < 128}
  innocent = {142, 143, 144}  # no cluster, asked to stop, another worker was lost
  for each in jobs:
    evicted, failed, stopped = each.job["podFailurePolicy"]["rules"]
    (condition,) = evicted["onPodConditions"]
    assert condition == {"type": "DisruptionTarget", "status": "True"}
    actions = [rule["action"] for rule in (evicted, failed, stopped)]
    assert actions == ["Ignore", "FailJob", "Ignore"]
    assert set(failed["onExitCodes"]["values"]) == permanent | OTHER_CODES
    assert set(stopped["onExitCodes"]["values"]) == innocent
    for rule in (failed, stopped):
      assert rule["onExitCodes"]["containerName"] == each.container["name"]
      assert rule["onExitCodes"]["operator"] == "In"
      assert rule["onPodConditions"] == []
    assert each.pod["restartPolicy"] == "Never"  # Kubernetes demands it
    assert each.job["backoffLimit"] > 0


def test_a_jobset_fails_for_good_and_resolves_names_before_pods_are_ready(
  jobsets: list[Document],
):
  for document in jobsets:
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    network = document["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert network["publishNotReadyAddresses"]


def test_a_pod_has_longer_to_end_than_training_takes_to_save(jobs: list[Launched]):
  for each in jobs:
    seconds = float(each.settings["GRACE_SECONDS"])
    assert each.pod["terminationGracePeriodSeconds"] >= seconds + SECONDS_TO_SPARE
    if each.module == "facedist.train":
      assert each.flags["grace_seconds"] == "$(GRACE_SECONDS)"


def test_liveness_looks_at_the_file_that_training_renews(
  trainers: list[Launched], tmp_path: pathlib.Path
):
  for each in trainers:
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


def test_no_pod_has_a_privilege_or_writes_outside_its_volumes(jobs: list[Launched]):
  for each in jobs:
    security = each.pod["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] >= 1000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not each.pod["automountServiceAccountToken"]
    assert each.pod.keys().isdisjoint(
      {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
    )
    own = each.container["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert (own["privileged"], own["allowPrivilegeEscalation"]) == (False, False)
    volumes = {volume["name"]: volume for volume in each.pod["volumes"]}
    mounts = {mount["name"]: mount for mount in each.container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert not any("hostPath" in volume for volume in volumes.values())
    assert mounts["scratch"]["mountPath"] == "/tmp"


def test_gke_s_pods_use_spot_nodes_identity_gpus_and_local_ssds():
  documents = render(FOLDER / "overlays/gke-gpu/train")
  (account,) = (each for each in documents if each["kind"] == "ServiceAccount")
  assert "iam.gke.io/gcp-service-account" in account["metadata"]["annotations"]
  trainer, evaluator = launched(documents)
  for each in (trainer, evaluator):
    assert each.pod["serviceAccountName"] == account["metadata"]["name"]
    assert each.pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert each.pod["terminationGracePeriodSeconds"] <= 25  # what GKE grants
    assert int(each.container["resources"]["limits"]["nvidia.com/gpu"]) > 0
  ssd = "cloud.google.com/gke-ephemeral-storage-local-ssd"
  assert trainer.pod["nodeSelector"][ssd] == "true"
  places = [mount["mountPath"] for mount in trainer.container["volumeMounts"]]
  assert trainer.settings["CACHE_DIR"] in places


def test_the_pods_of_a_lost_node_are_replaced_after_half_a_minute(jobs: list[Launched]):
  for each in jobs:
    tolerated = [one for one in each.pod["tolerations"] if one["effect"] == "NoExecute"]
    assert {one["key"]: one["tolerationSeconds"] for one in tolerated} == {
      "node.kubernetes.io/unreachable": 30,
      "node.kubernetes.io/not-ready": 30,
    }


def test_a_pod_that_waits_for_its_peers_is_not_taken_for_a_dead_one(
  trainers: list[Launched],
):
  for each in trainers:
    probe = each.container["startupProbe"]
    timeouts = probe["periodSeconds"] * probe["failureThreshold"]
    assert timeouts >= float(each.flags["start_timeout"])


def gibibytes(text: str) -> float:
  assert text.endswith("Gi")
  return float(text.removesuffix("Gi"))


def test_every_container_says_what_it_needs_and_volumes_fit_in_it(jobs: list[Launched]):
  for each in jobs:
    requests, limits = (
      each.container["resources"][key] for key in ("requests", "limits")
    )
    assert "cpu" in requests
    used = {"ephemeral-storage": 0.0, "memory": 0.0}
    for folder in (one["emptyDir"] for one in each.pod["volumes"] if "emptyDir" in one):
      kind = "memory" if folder.get("medium") == "Memory" else "ephemeral-storage"
      used[kind] += gibibytes(folder["sizeLimit"])
    for kind in used:
      assert requests[kind] == limits[kind]
    assert 0 < used["ephemeral-storage"] <= gibibytes(limits["ephemeral-storage"])
    assert used["memory"] < gibibytes(limits["memory"])
