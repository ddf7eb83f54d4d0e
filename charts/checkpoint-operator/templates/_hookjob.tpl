{{/* The spec of a Job that runs one subcommand of `operator`: {root, name, account, args}. */}}
{{- define "checkpoint-operator.hookJob" -}}
backoffLimit: 2
activeDeadlineSeconds: 240
# An older CRD (3) or a wrong argument (2) stays what it is: tell at once.
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes:
        operator: In
        values: [2, 3]
template:
  metadata:
    labels:
      {{- include "checkpoint-operator.selectorLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .name }}
  spec:
    {{- include "checkpoint-operator.hookPod" . | nindent 4 }}
{{- end }}

{{- define "checkpoint-operator.hookPod" -}}
restartPolicy: Never
serviceAccountName: {{ .account }}
automountServiceAccountToken: true
{{- include "checkpoint-operator.scheduling" .root }}
securityContext:
  {{- include "checkpoint-operator.podSecurityContext" .root | nindent 2 }}
containers:
  - name: {{ .name }}
    image: {{ include "checkpoint-operator.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [operator]
    args: {{ toJson .args }}
    terminationMessagePolicy: FallbackToLogsOnError
    {{- with .root.Values.extraEnv }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    resources:
      {{- toYaml .root.Values.hookResources | nindent 6 }}
    securityContext:
      {{- include "checkpoint-operator.securityContext" .root | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
volumes:
  - name: tmp
    emptyDir:
      sizeLimit: 16Mi
{{- end }}
