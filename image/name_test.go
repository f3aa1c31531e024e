package image

import (
	"errors"
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	hex := strings.Repeat("ab", 32)
	for _, tt := range []struct{ in, stored, shown string }{
		{"nginx", "docker.io/library/nginx:latest", "nginx:latest"},
		{"nginx:1.27", "docker.io/library/nginx:1.27", "nginx:1.27"},
		{"index.docker.io/nginx", "docker.io/library/nginx:latest", "nginx:latest"},
		{"me/app", "docker.io/me/app:latest", "me/app:latest"},
		{"localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b:c"},
		{"nginx:1.27@sha256:" + hex, "docker.io/library/nginx@sha256:" + hex, "nginx@sha256:" + hex},
		{hex, "sha256:" + hex, "sha256:" + hex},
		{"sha256:" + hex, "sha256:" + hex, "sha256:" + hex},
		{"oci:d/x:v1", "oci:/cwd/d/x:v1", "oci:/cwd/d/x:v1"},
		{"oci:/d/../x", "oci:/x", "oci:/x"},
		{"docker-archive:a.tar:nginx", "docker-archive:/cwd/a.tar:docker.io/library/nginx:latest", "docker-archive:/cwd/a.tar:docker.io/library/nginx:latest"},
	} {
		n, err := ParseNameIn("/cwd", tt.in)
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
			continue
		}
		if n.String() != tt.stored || n.Familiar() != tt.shown {
			t.Errorf("%s: stored %s, shown %s; want %s, %s", tt.in, n, n.Familiar(), tt.stored, tt.shown)
		}
		if again, err := ParseName(n.String()); err != nil || again != n {
			t.Errorf("%s: parsed again: %v, %v", n, again, err)
		}
	}
	for _, in := range []string{"", "Nginx", "a/b:", "oci:", "docker-archive:", "docker-archive:x:UPPER", "x@sha256:12"} {
		if n, err := ParseName(in); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v, %v; want ErrMalformed", in, n, err)
		}
	}
}
