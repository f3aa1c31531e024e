package run

import (
	"slices"
	"strings"
)

// defaultPath is what programs are looked for in where nobody says otherwise.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environ is a container's environment: what is always there, the image's, the
// user's, each over the one before, and what more a process of it is given. HOME
// is home unless one of them has it.
func (c *Container) environ(hostname, home string, tty bool, more ...string) []string {
	base := []string{"PATH=" + defaultPath, "HOSTNAME=" + hostname}
	if tty {
		base = append(base, "TERM=xterm")
	}
	env := merge(base, c.Image.Env, c.Options.Env, more)
	if !slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") }) {
		env = append(env, "HOME="+home)
	}
	return env
}

// merge sets each K=V in the place where K was first set. A K alone takes it away.
func merge(lists ...[]string) (out []string) {
	place := map[string]int{}
	for _, kv := range slices.Concat(lists...) {
		key, _, set := strings.Cut(kv, "=")
		at, have := place[key]
		switch {
		case have && set:
			out[at] = kv
		case set:
			place[key] = len(out)
			out = append(out, kv)
		case have:
			out[at] = ""
			delete(place, key)
		}
	}
	return slices.DeleteFunc(out, func(kv string) bool { return kv == "" })
}
