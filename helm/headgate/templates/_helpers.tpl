{{- define "headgate.name" -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-headgate" .Release.Name) (contains "headgate" .Release.Name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects; never changes. Takes (root, part). */}}
{{- define "headgate.selector" -}}
app.kubernetes.io/name: headgate
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .part }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "headgate.labels" -}}
{{ include "headgate.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* A part's ServiceAccount. Takes (root, part, of: its values). */}}
{{- define "headgate.serviceAccount" -}}
{{ .of.serviceAccount.name | default (printf "%s-%s" (include "headgate.name" .root) .part) }}
{{- end -}}

{{/* The sinks that are made, by their names in values: postgres, and remoteWrite where it has receivers. */}}
{{- define "headgate.sinks" -}}
postgres{{ if .Values.config.remote_write }} remoteWrite{{ end }}
{{- end -}}

{{/* A sink's part. Takes its name in values. */}}
{{- define "headgate.sink" -}}
{{ ternary "remote-writer" (printf "consumer-%s" .) (eq . "remoteWrite") }}
{{- end -}}

{{- define "headgate.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{/* What no worker takes up while it runs: a change of it restarts them. All else in headgate.yaml they read again by themselves. */}}
{{- define "headgate.checksum" -}}
{{- $fixed := pick .Values.config "kafka" "postgres" "s3" "slots" "run" -}}
{{ toJson (list $fixed .Values.secretEnv .Values.secretFiles) | sha256sum }}
{{- end -}}

{{/* What of secretEnv is to be a Secret of the chart's own. */}}
{{- define "headgate.ownSecrets" -}}
{{- range $name, $from := .Values.secretEnv }}
{{- if hasKey $from "value" }}
{{ $name }}: {{ $from.value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Of every container. Takes (root, suffix: of the names of the ConfigMap and the Secret). */}}
{{- define "headgate.container" -}}
image: {{ include "headgate.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: config
    mountPath: /etc/headgate
    readOnly: true
  {{- if .root.Values.secretFiles }}
  - name: secrets
    mountPath: /etc/headgate-secrets
    readOnly: true
  {{- end }}
  {{- if eq (.part | default "") "exporter" }}
  - name: spool
    mountPath: /tmp
  {{- end }}
{{- end -}}

{{/* Of every container's env. Takes (root, suffix, of: a part's values, whose own secrets come first). */}}
{{- define "headgate.env" -}}
{{- range $name, $value := .root.Values.pod.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- $own := printf "%s%s" (include "headgate.name" .root) .suffix }}
{{- range $name, $from := merge (deepCopy .of.secretEnv) .root.Values.secretEnv }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $from.secret | default $own }}
      key: {{ $from.key | default $name }}
{{- end }}
{{- end -}}

{{/* Of every pod. Takes (root, part, of, suffix). */}}
{{- define "headgate.pod" -}}
serviceAccountName: {{ include "headgate.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.pod.runAsUser }}
  runAsGroup: {{ .root.Values.pod.runAsUser }}
  fsGroup: {{ .root.Values.pod.runAsUser }}
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .root.Values.pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "headgate.name" .root }}{{ .suffix }}
  {{- with .root.Values.secretFiles }}
  - name: secrets
    secret:
      secretName: {{ . }}
  {{- end }}
  {{- if eq .part "exporter" }}
  # Payloads of heavy tasks until they are published, half a gigabyte a task at most: on the node's disk, not in memory.
  - name: spool
    emptyDir: {sizeLimit: 4Gi}
  {{- end }}
{{- end -}}

{{/* The pod of a worker: coordinator, exporter, consumer. Takes (root, part, of, args, env, shard). Its labels are the selector's alone: a new
     version of the chart by itself restarts nothing. */}}
{{- define "headgate.worker" -}}
metadata:
  labels:
    {{- include "headgate.selector" . | nindent 4 }}
    {{- with .shard }}
    headgate/shard: {{ . }}
    {{- end }}
    {{- with .root.Values.pod.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "headgate.checksum" .root }}
    {{- with .root.Values.pod.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "headgate.pod" (dict "root" .root "part" .part "of" .of "suffix" "") | nindent 2 }}
  terminationGracePeriodSeconds: {{ .root.Values.pod.terminationGracePeriodSeconds }}
  {{- if ne .root.Values.pod.spread "none" }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: {{ $.root.Values.pod.spread }}
      labelSelector:
        matchLabels:
          {{- include "headgate.selector" (dict "root" $.root "part" $.part) | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - name: headgate
      {{- include "headgate.container" . | nindent 6 }}
      args:
        {{- toYaml (concat .args (list "--config" "/etc/headgate/headgate.yaml" "--host" "0.0.0.0" "--metrics-port" "9100")) | nindent 8 }}
      {{- with (concat .env (include "headgate.env" (dict "root" .root "suffix" "" "of" .of) | fromYamlArray)) }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: metrics
          containerPort: 9100
      # Python and its imports take seconds on a busy node; until this answers, liveness is not asked.
      startupProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 2
        timeoutSeconds: 5
        failureThreshold: 60
      # 503 where a loop of the worker has stood still for ten minutes; no answer where the event loop has.
      livenessProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      # An exporter owns slots, a coordinator has announced a plan, a consumer has read from Kafka.
      readinessProbe:
        httpGet: {path: /readyz, port: metrics}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      resources:
        {{- toYaml .of.resources | nindent 8 }}
{{- end -}}
