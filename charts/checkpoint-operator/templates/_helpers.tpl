{{- define "checkpoint-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Short enough that "-finalizers" and a Job's own suffix fit into 63 characters. */}}
{{- define "checkpoint-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "checkpoint-operator.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "checkpoint-operator.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "checkpoint-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "checkpoint-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "checkpoint-operator.labels" -}}
{{ include "checkpoint-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "checkpoint-operator.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "checkpoint-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "checkpoint-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed with serviceAccount.create=false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", for every pod of the chart. */}}
{{- define "checkpoint-operator.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "checkpoint-operator.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "checkpoint-operator.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What may be done in every namespace that is served. docs/permissions.md says why, and a test compares. */}}
{{- define "checkpoint-operator.namespacedRules" -}}
- apiGroups: [checkpoints.rlhf.dev]
  resources: [checkpointartifacts]
  verbs: [get, list, watch, patch]
- apiGroups: [checkpoints.rlhf.dev]
  resources: [checkpointartifacts/status]
  verbs: [patch]
# For clusters that enforce OwnerReferencesPermissionEnforcement: movers' Jobs block their owner's deletion.
- apiGroups: [checkpoints.rlhf.dev]
  resources: [checkpointartifacts/finalizers]
  verbs: [update]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- if eq .Values.executor "job" }}
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
{{- if .Values.progress.fromLogs }}
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [persistentvolumeclaims, serviceaccounts, namespaces]
  verbs: [get]
{{- end }}
{{- end }}

{{- define "checkpoint-operator.nodeRules" -}}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
{{- end }}

{{/* The file of the Job executor: the values of `movers` (what is empty is left to the operator), and what the chart knows. */}}
{{- define "checkpoint-operator.jobsConfig" -}}
{{- $rules := dict "image" (include "checkpoint-operator.image" .) "imagePullPolicy" .Values.image.pullPolicy }}
{{- $_ := set $rules "progressFromLogs" .Values.progress.fromLogs }}
{{- range $key, $value := omit .Values.movers "proxy" }}
{{- if ne (toString $value) "" }}{{ $_ := set $rules $key $value }}{{ end }}
{{- end }}
{{- $proxy := dict }}
{{- range $key, $value := .Values.movers.proxy }}
{{- if $value }}{{ $_ := set $proxy $key $value }}{{ end }}
{{- end }}
{{- if $proxy }}{{ $_ := set $rules "proxy" $proxy }}{{ end }}
{{- if and .Values.caBundle.pem .Values.caBundle.configMap.name }}
{{- fail "caBundle: set pem or configMap.name, not both" }}
{{- end }}
{{- with .Values.caBundle.pem }}{{ $_ := set $rules "caBundle" . }}{{ end }}
{{- if .Values.caBundle.configMap.name }}
{{- $_ := set $rules "caBundleFile" (printf "/etc/checkpoint-operator-ca/%s" .Values.caBundle.configMap.key) }}
{{- end }}
{{- toYaml $rules }}
{{- end }}
