package run

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
)

// A container's own hosts where it does not have the host's network.
const localHosts = `127.0.0.1	localhost
::1	localhost ip6-localhost ip6-loopback
fe00::	ip6-localnet
ff00::	ip6-mcastprefix
ff02::1	ip6-allnodes
ff02::2	ip6-allrouters
`

// hostname is what the container's host is called.
func (c *Container) hostname() (string, error) {
	if c.Options.Hostname != "" {
		return c.Options.Hostname, nil
	}
	if c.Options.Network == NetworkNone {
		return c.ID[:min(12, len(c.ID))], nil
	}
	return os.Hostname()
}

// etc writes the files that are mounted over the root's own, and says where each
// belongs.
func (c *Container) etc(dir, hostname string) ([]place, error) {
	hosts := []byte(localHosts)
	if c.Options.Network != NetworkNone {
		var err error
		if hosts, err = readHost("/etc/hosts"); err != nil {
			return nil, err
		}
		if len(hosts) > 0 && !bytes.HasSuffix(hosts, []byte("\n")) {
			hosts = append(hosts, '\n')
		}
	}
	for _, h := range c.Options.AddHosts {
		name, ip, err := parseHost(h)
		if err != nil {
			return nil, err
		}
		hosts = fmt.Appendf(hosts, "%s\t%s\n", ip, name)
	}
	resolv, err := readHost("/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	var out []place
	for _, f := range []struct {
		name string
		data []byte
	}{{"resolv.conf", resolv}, {"hostname", []byte(hostname + "\n")}, {"hosts", hosts}} {
		file := filepath.Join(dir, f.name)
		if err := os.WriteFile(file, f.data, 0o644); err != nil {
			return nil, err
		}
		if err := os.Chmod(file, 0o644); err != nil { // the umask
			return nil, err
		}
		out = append(out, place{kind: bindPlace, source: file, dest: "/etc/" + f.name, readOnly: c.Options.ReadOnly})
	}
	return out, nil
}
