package run

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Caller is what options mean something to: the process that a user started.
type Caller struct {
	Dir    string                          // its working directory
	Getenv func(key string) (string, bool) // os.LookupEnv
}

// Resolve puts into o what only its caller knows: values for K in Env, the files
// of EnvFiles, host directories that begin with a dot, seccomp profiles. The
// caller's process does it, before o goes to the daemon.
func (o *Options) Resolve(c Caller) (err error) {
	if o.Env, err = c.env(o.EnvFiles, o.Env); err != nil {
		return err
	}
	o.EnvFiles = nil
	for i, v := range o.Volumes {
		src, rest, ok := strings.Cut(v, ":")
		if ok && (src == "." || src == ".." || strings.HasPrefix(src, "./") || strings.HasPrefix(src, "../")) {
			o.Volumes[i] = filepath.Join(c.Dir, src) + ":" + rest
		}
	}
	for i, opt := range o.Security.Opt {
		// docker once wrote a colon.
		if key, value, ok := strings.Cut(opt, ":"); ok && !strings.Contains(key, "=") {
			opt = key + "=" + value
			o.Security.Opt[i] = opt
		}
		file, ok := strings.CutPrefix(opt, "seccomp=")
		if !ok || file == "unconfined" || file == "builtin" || strings.HasPrefix(file, "{") {
			continue
		}
		if !filepath.IsAbs(file) {
			file = filepath.Join(c.Dir, file)
		}
		raw, err := readAll(file)
		if err != nil {
			return fmt.Errorf("opening seccomp profile (%s) failed: %w", file, err)
		}
		var b bytes.Buffer
		if err := json.Compact(&b, raw); err != nil {
			return fmt.Errorf("seccomp profile %s: %w", file, err)
		}
		o.Security.Opt[i] = "seccomp=" + b.String()
	}
	return nil
}

// Resolve is as that of [Options].
func (o *ExecOptions) Resolve(c Caller) (err error) {
	o.Env, err = c.env(o.EnvFiles, o.Env)
	o.EnvFiles = nil
	return err
}

// env is what files and a command line set, the latter last.
func (c Caller) env(files, line []string) ([]string, error) {
	var out []string
	for _, name := range files {
		if !filepath.IsAbs(name) {
			name = filepath.Join(c.Dir, name)
		}
		raw, err := readAll(name)
		if err != nil {
			return nil, err
		}
		vars, err := c.envFile(name, raw)
		if err != nil {
			return nil, err
		}
		out = append(out, vars...)
	}
	for _, kv := range line {
		key, _, set := strings.Cut(kv, "=")
		if key == "" {
			return nil, fmt.Errorf("invalid environment variable: %s", kv)
		}
		if !set {
			if value, ok := c.Getenv(key); ok {
				kv += "=" + value
			}
		}
		out = append(out, kv)
	}
	return out, nil
}

// envFile reads K=V lines as docker does: spaces before them, empty lines and
// those that begin with # are nothing; values are taken as they stand, quotes too;
// K alone is the caller's, and nothing where the caller has none.
func (c Caller) envFile(name string, raw []byte) ([]string, error) {
	var out []string
	lines := bufio.NewScanner(bytes.NewReader(bytes.TrimPrefix(raw, []byte("\xef\xbb\xbf"))))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if !utf8.ValidString(line) {
			return nil, fmt.Errorf("%s: line %d is not UTF-8", name, n)
		}
		line = strings.TrimLeftFunc(line, unicode.IsSpace)
		if line == "" || line[0] == '#' {
			continue
		}
		key, _, set := strings.Cut(line, "=")
		switch {
		case key == "":
			return nil, fmt.Errorf("%s: line %d: no variable name on line '%s'", name, n, line)
		case strings.ContainsFunc(key, unicode.IsSpace):
			return nil, fmt.Errorf("%s: line %d: variable '%s' contains whitespaces", name, n, key)
		case set:
			out = append(out, line)
		default:
			if value, ok := c.Getenv(key); ok {
				out = append(out, key+"="+value)
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return out, nil
}
