{{- define "tokenbus.selector" -}}
app.kubernetes.io/name: tokenbus
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tokenbus.labels" -}}
{{ include "tokenbus.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tokenbus.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.count }}
{{- $gpus := dict .Values.gpu.resource .Values.gpu.count }}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpus) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "tokenbus.check" -}}
{{- $most := .Values.replicas }}
{{- if .Values.autoscaling.enabled }}
{{- $most = .Values.autoscaling.maxReplicas }}
{{- end }}
{{- if and (gt (int $most) 1) (not (dig "journal" "url" "" .Values.settings)) }}
{{- fail "settings.journal.url: must be given for more than one replica, for they share a broker only with a journal that they share too" }}
{{- end }}
{{- $ranks := dig "model" "tensor_parallel" 1 .Values.settings }}
{{- if and .Values.gpu.count (ne (int .Values.gpu.count) (int $ranks)) }}
{{- fail (printf "gpu.count: must be settings.model.tensor_parallel, %d" (int $ranks)) }}
{{- end }}
{{- end }}
