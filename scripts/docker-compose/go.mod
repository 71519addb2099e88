// Nothing of ours: it names the Compose that the stack is tried with where there
// is none, and go.sum fixes every module that goes into it. ../compose.sh builds it.
module github.com/diurnalog/diurna/scripts/docker-compose

go 1.26.0

require github.com/docker/compose/v2 v2.40.3
