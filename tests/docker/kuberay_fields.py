"""Fields of KubeRay's custom resources that our manifests may use, and which are required.

From KubeRay 1.6.2: docs/reference/api.md at 0a9eabde561ab59ab4bbe626072c359da9214484, generated
there from the types of the CRDs; what those do not mark as optional is required.

A field's type is a scalar (`str`, `int`, `bool`, `float`), `map` (text to text), the name of
another entry, or `core:TYPE`, a type of Kubernetes; `[TYPE]` is a list; `a|b` lists the values.
"""

from __future__ import annotations

FIELDS: dict[str, dict[str, str]] = {
    "RayCluster": {"apiVersion": "str", "kind": "str", "metadata": "any", "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": "str", "kind": "str", "metadata": "any", "spec": "RayJobSpec"},
    "RayClusterSpec": {
        "upgradeStrategy": "UpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "bool",
        "managedBy": "str",
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": "bool",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec": "HeadGroupSpec",
        "rayVersion": "str",
        "workerGroupSpecs": "[WorkerGroupSpec]",
    },
    "UpgradeStrategy": {"type": "Recreate|None"},
    "AuthOptions": {"enableK8sTokenAuth": "bool", "secretName": "str", "mode": "disabled|token"},
    "AutoscalerOptions": {
        "resources": "core:ResourceRequirements",
        "image": "str",
        "imagePullPolicy": "Always|IfNotPresent|Never",
        "securityContext": "core:SecurityContext",
        "idleTimeoutSeconds": "int",
        "upscalingMode": "Default|Aggressive|Conservative",
        "version": "v1|v2",
        "env": "core:Env",
        "envFrom": "core:EnvFrom",
        "volumeMounts": "core:VolumeMounts",
    },
    "GcsFaultToleranceOptions": {
        "redisUsername": "RedisCredential",
        "redisPassword": "RedisCredential",
        "externalStorageNamespace": "str",
        "redisAddress": "str",
    },
    "RedisCredential": {"valueFrom": "any", "value": "str"},
    "HeadGroupSpec": {
        "template": "core:PodTemplateSpec",
        "headService": "core:Service",
        "enableIngress": "bool",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "serviceType": "ClusterIP|NodePort|LoadBalancer",
    },
    "WorkerGroupSpec": {
        "suspend": "bool",
        "groupName": "str",
        "replicas": "int",
        "minReplicas": "int",
        "maxReplicas": "int",
        "idleTimeoutSeconds": "int",
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "template": "core:PodTemplateSpec",
        "scaleStrategy": "ScaleStrategy",
        "numOfHosts": "int",
    },
    "ScaleStrategy": {"workersToDelete": "[str]"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int",
        "backoffLimit": "int",
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "core:PodTemplateSpec",
        "metadata": "map",
        "clusterSelector": "map",
        "submitterConfig": "SubmitterConfig",
        "managedBy": "str",
        "deletionStrategy": "any",
        "entrypoint": "str",
        "runtimeEnvYAML": "str",
        "jobId": "str",
        "submissionMode": "K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
        "entrypointResources": "str",
        "entrypointNumCpus": "float",
        "entrypointNumGpus": "float",
        "ttlSecondsAfterFinished": "int",
        "preRunningDeadlineSeconds": "int",
        "shutdownAfterJobFinishes": "bool",
        "suspend": "bool",
    },
    "SubmitterConfig": {"backoffLimit": "int"},
}

REQUIRED: dict[str, tuple[str, ...]] = {
    "RayCluster": ("apiVersion", "kind", "metadata", "spec"),
    "RayJob": ("apiVersion", "kind", "metadata", "spec"),
    "RayClusterSpec": ("headGroupSpec",),
    "HeadGroupSpec": ("template",),
    "WorkerGroupSpec": ("groupName", "minReplicas", "maxReplicas", "template"),
    "GcsFaultToleranceOptions": ("redisAddress",),
}
