{{- define "sidegate.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride }}
{{- else if contains $name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sidegate.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sidegate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "sidegate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The reference of an image: a digest wins over a tag. Call with (list . "controlPlane"). */}}
{{- define "sidegate.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- if $image.digest }}{{ printf "%s@%s" $image.repository $image.digest }}
{{- else }}{{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{- define "sidegate.excludedNamespaces" -}}
{{- append .Values.excludedNamespaces .Release.Namespace | uniq | toJson }}
{{- end }}

{{/* Of two versions side by side each namespace belongs to one. */}}
{{- define "sidegate.revisionSelector" -}}
{{- if .Values.canary -}}
- {key: sidegate.dev/revision, operator: In, values: [{{ .Values.revision | quote }}]}
{{- else if .Values.canaries -}}
- {key: sidegate.dev/revision, operator: NotIn, values: {{ toJson .Values.canaries }}}
{{- end }}
{{- end }}

{{/* The control plane's settings. One without a value is left to the code's default: `helm upgrade --reuse-values` knows no
     values that are newer than the release. Call with a dict of names and values. */}}
{{- define "sidegate.environment" -}}
{{- range $name, $value := . }}
{{- if kindIs "float64" $value }}
- {name: SIDEGATE_{{ $name }}, value: {{ int64 $value | quote }}}
{{- else if not (kindIs "invalid" $value) }}
- {name: SIDEGATE_{{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* The control plane and sidecars have identities of one form. */}}
{{- define "sidegate.spiffeID" -}}
spiffe://{{ .Values.spiffe.trustDomain }}/ns/{{ .Release.Namespace }}/sa/{{ include "sidegate.fullname" . }}
{{- end }}

{{- define "sidegate.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sidegate.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A list of strings as a CEL literal. */}}
{{- define "sidegate.celList" -}}
[{{ range $index, $each := . }}{{ if $index }}, {{ end }}'{{ $each }}'{{ end }}]
{{- end }}

{{/* The lines of a namespaceSelector: who asked to be governed. */}}
{{- define "sidegate.governedNamespaces" -}}
matchExpressions:
  - {key: sidegate.dev/injection, operator: In, values: [enabled, enforced]}
  - {key: kubernetes.io/metadata.name, operator: NotIn, values: {{ include "sidegate.excludedNamespaces" . }}}
  {{- with include "sidegate.revisionSelector" . }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* The same namespaces, as one line. */}}
{{- define "sidegate.governedSelector" -}}
sidegate.dev/injection in (enabled,enforced)
{{- if .Values.canary }},sidegate.dev/revision in ({{ .Values.revision }})
{{- else if .Values.canaries }},sidegate.dev/revision notin ({{ join "," .Values.canaries }})
{{- end }}
{{- end }}

{{/* A value as JSON; nothing for none. */}}
{{- define "sidegate.json" -}}
{{- if not (kindIs "invalid" .) }}{{ toJson . }}{{ end }}
{{- end }}

{{/* What all our pods have in common. A Service called sidegate would put variables of its own among our settings. */}}
{{- define "sidegate.pod" -}}
automountServiceAccountToken: true
enableServiceLinks: false
securityContext:
  {{- include "sidegate.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
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
