package run

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// lookup finds a user in the root's own /etc/passwd and /etc/group, docker's
// way: name|uid[:group|gid], "" for root, with the groups that the files name
// unless a group is given, and further groups by name or gid. It also gives the
// user's home.
func lookup(t *tree, who string, groups []string) (specs.User, string, error) {
	var u specs.User
	passwd, err := t.open("etc/passwd")
	if err != nil {
		return u, "", err
	}
	group, err := t.open("etc/group")
	if err != nil {
		closeAll(passwd)
		return u, "", err
	}
	defer closeAll(passwd, group)
	found, err := user.GetExecUser(who, &user.ExecUser{Home: "/"}, reader(passwd), reader(group))
	if err != nil {
		return u, "", err
	}
	u = specs.User{UID: uint32(found.Uid), GID: uint32(found.Gid), AdditionalGids: []uint32{uint32(found.Gid)}}
	for _, g := range found.Sgids {
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	if len(groups) > 0 {
		// The reader is at its end.
		group, err := t.open("etc/group")
		if err != nil {
			return u, "", err
		}
		defer closeAll(group)
		more, err := user.GetAdditionalGroups(groups, reader(group))
		if err != nil {
			return u, "", err
		}
		slices.Sort(more) // they come in any order
		for _, g := range more {
			u.AdditionalGids = append(u.AdditionalGids, uint32(g))
		}
	}
	home := found.Home
	if home == "" || home[0] != '/' {
		home = "/"
	}
	return u, home, nil
}

// reader gives user's functions a nil that they take for one.
func reader(f io.ReadCloser) io.Reader {
	if f == nil {
		return nil
	}
	return f
}

func closeAll(files ...io.Closer) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// readHost reads a file of the host's; one that is missing is empty.
func readHost(name string) ([]byte, error) {
	b, err := readAll(name)
	if os.IsNotExist(err) {
		return nil, nil
	}
	return b, err
}

// readAll reads a file of at most maxFile bytes, which may be a pipe's.
func readAll(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s has more than %d bytes", name, maxFile)
	}
	return b, err
}
