{{/* Name of namespaced objects: the release's. */}}
{{- define "finetune.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Name of cluster-wide objects: two releases may share a name in different namespaces. */}}
{{- define "finetune.clusterName" -}}
{{ include "finetune.name" . }}.{{ .Release.Namespace }}
{{- end }}

{{- define "finetune.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "finetune.name" .) }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Subject of every binding. */}}
{{- define "finetune.subjects" -}}
- kind: ServiceAccount
  name: {{ include "finetune.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{/* What a namespace that is watched must grant; the table in operator/finetune_operator/kube.py says why. */}}
{{- define "finetune.jobRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]  # an owner's finalizers, where OwnerReferencesPermissionEnforcement is on
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [get, create, delete]
- apiGroups: [""]
  resources: [events]  # why a pod waits, in the scheduler's words
  verbs: [list]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
