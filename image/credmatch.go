package image

import (
	"net"
	"net/url"
	"path"
	"strings"
)

// matchesImage reports whether a pattern of the kubelet's is for a repository, by
// any name of its registry. In the host each part between dots may have stars,
// which stand for nothing with a dot in it; ports must be equal; a path is a
// beginning of the repository's (kubelet-config.v1, matchImages).
func matchesImage(pattern, registry, repository string) bool {
	pattern = strings.TrimPrefix(strings.TrimPrefix(pattern, "http://"), "https://")
	u, err := url.Parse("https://" + pattern)
	if err != nil || u.Host == "" {
		return false
	}
	// docker login writes the API's root.
	prefix := strings.TrimPrefix(u.Path, "/")
	for _, root := range []string{"v1/", "v2/"} {
		if rest, ok := strings.CutPrefix(prefix, root); ok {
			prefix = rest
			break
		}
	}
	if !strings.HasPrefix(repository, prefix) {
		return false
	}
	for _, host := range hostNames(registry) {
		if matchesHost(u.Host, host) {
			return true
		}
	}
	return false
}

// hostNames gives the hosts that a registry is known by.
func hostNames(registry string) []string {
	switch registry {
	case "docker.io", "index.docker.io", dockerHub:
		return []string{"docker.io", "index.docker.io", dockerHub}
	}
	return []string{registry}
}

func matchesHost(pattern, host string) bool {
	parts, port := splitHost(pattern)
	have, havePort := splitHost(host)
	if port != havePort || len(parts) != len(have) {
		return false
	}
	for i, p := range parts {
		if ok, err := path.Match(p, have[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

func splitHost(addr string) (parts []string, port string) {
	if h, p, err := net.SplitHostPort(addr); err == nil {
		addr, port = h, p
	}
	return strings.Split(addr, "."), port
}
