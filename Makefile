# cake: one binary a stage. `make help` lists what there is to make.
#
#   CXX=clang++      another compiler (g++ 12 or clang 14 and newer)
#   MARCH=x86-64-v3  another machine than this one
#   WERROR=1         warnings are errors
#   CXXFLAGS=-g      further flags
#   BUILD=dir        where objects go; BIN=dir: where the stages' binaries go
#   -jN              so many compilers at once, not one a processor

BUILD ?= build
BIN ?= .
MARCH ?= native
CLANG_FORMAT ?= $(firstword $(shell command -v clang-format-14 clang-format) clang-format-14)

# GCC 12 warns about every "..." + std::string (its bug 105651).
GCC_ONLY := $(if $(findstring clang,$(CXX)),,-Wno-restrict)
FLAGS := -std=c++20 -O3 -march=$(MARCH) -ffp-contract=fast -fopenmp -I. \
         -Wall -Wextra -Wno-missing-field-initializers $(GCC_ONLY) $(if $(WERROR),-Werror) $(CXXFLAGS)
LIBRARIES := -Wl,--as-needed -lsimdjson -lzstd -lz
HEADERS := CLI/CLI.hpp doctest/doctest.h nlohmann/json.hpp omp.h simdjson.h xxhash.h zlib.h zstd.h

STAGES := bpe train_gpt chat
SOURCES = $(wildcard *.cpp *.h cake/*.h dev/*.cpp dev/*.h dev/*/*.cpp dev/*/*.h test/*.cpp test/*.h)

# Two stages are libraries too: compiled a second time without their main. test/test_gpt.cpp and
# dev/bench/bench.cpp include train_gpt.cpp itself: they look at what is inside.
OBJECTS := $(BUILD)/objects
LIBRARY := $(OBJECTS)/bpe.lib.o $(OBJECTS)/train_gpt.lib.o
TESTS := $(patsubst %.cpp,$(OBJECTS)/%.o,$(wildcard test/*.cpp))

ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif
ifneq ($(filter clean,$(MAKECMDGOALS)),)
.NOTPARALLEL: # `make clean all`: one after the other
endif

all: $(STAGES:%=$(BIN)/%) $(BUILD)/world ## all binaries (the default)

run: ## set up, build and bake the whole cake: RUN=dir TEXT=path MINUTES=n
	@dev/setup.sh
	@$(MAKE) --no-print-directory all
	@dev/demo.sh
export RUN TEXT MINUTES

test: ## set up, build and run every test
	@dev/setup.sh
	@$(MAKE) --no-print-directory all $(BUILD)/test
	@$(BUILD)/test

bench: $(BUILD)/bench ## measure this machine and cake on it: PEER=python with PyTorch
	@$(BUILD)/bench $(if $(PEER),--peer $(PEER))

format: ## format all sources
	@$(CLANG_FORMAT) -i $(SOURCES)

format-check: ## say which sources are not formatted
	@$(CLANG_FORMAT) --dry-run --Werror $(SOURCES)

clean: ## remove everything that was built
	rm -rf $(BUILD) $(STAGES:%=$(BIN)/%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -------------------------------------------------------------------------------------------------
# Binaries

$(BIN)/bpe: $(OBJECTS)/bpe.o
$(BIN)/train_gpt: $(OBJECTS)/train_gpt.o $(OBJECTS)/bpe.lib.o
$(BIN)/chat: $(OBJECTS)/chat.o $(LIBRARY)
$(BUILD)/world: $(OBJECTS)/dev/world.o
$(BUILD)/bench: $(OBJECTS)/dev/bench/bench.o $(OBJECTS)/bpe.lib.o
$(BUILD)/test: $(TESTS) $(OBJECTS)/bpe.lib.o $(OBJECTS)/dev/world.lib.o

$(STAGES:%=$(BIN)/%) $(BUILD)/world $(BUILD)/bench $(BUILD)/test:
	@echo "link $@"
	@$(CXX) $(FLAGS) $(filter %.o,$^) $(LIBRARIES) -o $@

# -------------------------------------------------------------------------------------------------
# Objects. Each depends on the headers it included last time, on the command that made it, and on
# the packages' being there.

$(OBJECTS)/%.o: %.cpp $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $<"
	@$(CXX) $(FLAGS) -MMD -MP -c $< -o $@

$(OBJECTS)/%.lib.o: %.cpp $(BUILD)/command | $(BUILD)/packages
	@mkdir -p $(@D)
	@echo "compile $< as a library"
	@$(CXX) $(FLAGS) -DCAKE_NO_MAIN -MMD -MP -c $< -o $@

# The tests' own code need not be fast: it compiles in two thirds of the time.
$(TESTS): FLAGS += -O1
$(OBJECTS)/test/test_gpt.o: FLAGS += -O3  # the engine itself is in it

-include $(shell find $(OBJECTS) -name '*.d' 2>/dev/null)

COMMAND := $(CXX) $(FLAGS) $(LIBRARIES)
$(BUILD)/command: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMAND)' | cmp -s - $@ || echo '$(COMMAND)' > $@

$(BUILD)/packages: $(BUILD)/command
	@command -v $(firstword $(CXX)) >/dev/null || \
	  { echo "error: $(firstword $(CXX)) is missing: run dev/setup.sh" >&2; exit 1; }
	@for header in $(HEADERS); do \
	  printf '#if !__has_include(<%s>)\n#error\n#endif\n' $$header | \
	    $(CXX) $(FLAGS) -E -x c++ - >/dev/null 2>&1 || \
	    { echo "error: <$$header> is missing: run dev/setup.sh" >&2; exit 1; }; \
	done
	@touch $@

.PHONY: all run test bench format format-check clean help FORCE
.DELETE_ON_ERROR:
.SUFFIXES:
