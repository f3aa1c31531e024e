package commit

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// maxPorts is the most ports that all ranges of the changes may make: three
// protocols have 196,608.
const maxPorts = 1 << 18

// expose adds ports. A variable may hold several of them: it is the one
// instruction whose words are split after they are expanded.
func (d *dispatcher) expose(specs, env []string, envs shell.EnvGetter) error {
	if d.run.ExposedPorts == nil {
		d.run.ExposedPorts = map[string]json.RawMessage{}
	}
	for _, word := range specs {
		if err := d.bound(word, env); err != nil {
			return err
		}
		words, err := d.lex.ProcessWords(word, envs)
		if err != nil {
			return err
		}
		for _, w := range words {
			first, last, proto, err := parsePorts(w)
			if err != nil {
				return err
			}
			if d.ports += last - first + 1; d.ports > maxPorts {
				return fmt.Errorf("more than %d ports", maxPorts)
			}
			for p := first; p <= last; p++ {
				key := strconv.Itoa(p) + "/" + proto
				if d.run.ExposedPorts[key] == nil {
					d.run.ExposedPorts[key] = json.RawMessage("{}")
				}
			}
		}
	}
	return nil
}

// parsePorts reads [[ADDRESS:][HOST]:]PORT[-PORT][/PROTOCOL] as docker does for
// EXPOSE: address and host's port are checked, and mean nothing.
func parsePorts(spec string) (first, last int, proto string, err error) {
	bad := func(what string) (int, int, string, error) {
		return 0, 0, "", fmt.Errorf("%s in port %.40q", what, spec)
	}
	ports, proto, _ := strings.Cut(spec, "/")
	switch proto = strings.ToLower(proto); proto {
	case "":
		proto = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return bad("unknown protocol")
	}
	host, ok := "", true
	if i := strings.LastIndexByte(ports, ':'); i >= 0 {
		host, ports = ports[:i], ports[i+1:]
		if i := strings.LastIndexByte(host, ':'); i >= 0 {
			address := strings.TrimSuffix(strings.TrimPrefix(host[:i], "["), "]")
			if _, err := netip.ParseAddr(address); err != nil && address != "" {
				return bad("invalid address")
			}
			host = host[i+1:]
		}
	}
	if first, last, ok = portRange(ports); !ok {
		return bad("invalid container port")
	}
	if host == "" {
		return first, last, proto, nil
	}
	from, to, ok := portRange(host)
	// One container port may be offered on any port of a range.
	if !ok || to-from != last-first && first != last {
		return bad("invalid host port")
	}
	return first, last, proto, nil
}

func portRange(s string) (first, last int, ok bool) {
	from, to, isRange := strings.Cut(s, "-")
	a, err := strconv.ParseUint(from, 10, 16)
	if err != nil {
		return 0, 0, false
	}
	if !isRange {
		return int(a), int(a), true
	}
	b, err := strconv.ParseUint(to, 10, 16)
	return int(a), int(b), err == nil && a <= b
}
