# Installs the build into an empty prefix, builds examples/cpp against it and runs the programs.
set(prefix ${BINARY_DIR}/installed_package/prefix)
set(build ${BINARY_DIR}/installed_package/build)
file(REMOVE_RECURSE ${BINARY_DIR}/installed_package)

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run(${CMAKE_COMMAND} --install ${BINARY_DIR} --prefix ${prefix})
run(${CMAKE_COMMAND} -S ${EXAMPLES} -B ${build} -G ${GENERATOR} -D CMAKE_BUILD_TYPE=Release
    -D CMAKE_CXX_COMPILER=${CXX_COMPILER} -D CMAKE_PREFIX_PATH=${prefix})
run(${CMAKE_COMMAND} --build ${build})
run(${build}/kernels_example)
if(HAS_OPS)
  run(${build}/ops_example)
endif()
