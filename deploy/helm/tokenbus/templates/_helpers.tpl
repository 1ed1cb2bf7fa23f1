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
