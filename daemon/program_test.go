package daemon

import (
	"slices"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestProgramPaths has a container's program looked for where the runtime would.
func TestProgramPaths(t *testing.T) {
	always := []string{"/etc/passwd", "/etc/group", "/bin/sh"}
	for name, c := range map[string]struct {
		config ocispec.ImageConfig
		want   []string
	}{
		"none":       {ocispec.ImageConfig{}, nil},
		"absolute":   {ocispec.ImageConfig{Cmd: []string{"/usr/bin/app", "-v"}}, []string{"/usr/bin/app"}},
		"relative":   {ocispec.ImageConfig{Cmd: []string{"./app"}, WorkingDir: "/srv"}, []string{"/srv/app", "/app"}},
		"entrypoint": {ocispec.ImageConfig{Entrypoint: []string{"/init"}, Cmd: []string{"app"}}, []string{"/init"}},
		"in PATH":    {ocispec.ImageConfig{Cmd: []string{"app"}, Env: []string{"PATH=/opt/bin::bin:/bin"}}, []string{"/opt/bin/app", "/bin/app"}},
		"no PATH":    {ocispec.ImageConfig{Cmd: []string{"app"}}, []string{"/usr/local/sbin/app", "/usr/local/bin/app", "/usr/sbin/app", "/usr/bin/app", "/sbin/app", "/bin/app"}},
		"above":      {ocispec.ImageConfig{Cmd: []string{"../../app"}}, []string{"/app"}},
	} {
		if got := newProgram(nil, c.config).next; !slices.Equal(got, append(slices.Clone(always), c.want...)) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
